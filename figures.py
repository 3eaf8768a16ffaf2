"""The README's figures, made from recorded results in one style that also reads in print and in grey.

    python figures.py                                  # all of them, to assets/ (a minute: the spectrograms are generated)
    python figures.py mechanism curves --out figures/  # some

| figure | made from |
|---|---|
| mechanism | results/regime-sr.jsonl, results/regime-t2a.jsonl: D, r and what r drives, over training |
| density | results/regime-sr.jsonl: p(t) at four moments |
| blocks | results/regime-t2a-deep.jsonl: block similarities at three moments |
| curves | results/e1*/rows.jsonl: quality over steps, mean and 95 % interval over seeds |
| sooner | results/e1*/summary.json: how many times fewer steps and seconds than `static` |
| differences | results/e*/summary.json: every arm against its control, in one picture |
| sounds | assets/demo: captions nobody trained on, real clip beside the model's |
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import config
import data
import evaluate
import experiments
import sampler
from data import UserError, run_cli

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left", "lines.linewidth": 1.6,
         "legend.frameon": False, "legend.fontsize": 8, "savefig.dpi": 130, "figure.constrained_layout.use": True}
# Colours differ in lightness too, and each has a dash of its own: either alone tells the arms apart.
ARMS = {"vanilla": ("#b0b0b0", ":"), "static": ("#1b1b1b", "-"), "stop": ("#7a5c00", "-."), "clock": ("#2a9d8f", (0, (5, 1))), "stage": ("#c1121f", "--")}
TITLES = {"e1": "captions: event-set accuracy", "e1-sr": "super-resolution: LSD-HF (lower is better)", "e1-esc10": "super-resolution of ESC-10 (lower is better)"}


def rows_of(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(f"{path}: missing; it is a recorded result of this project (git checkout it, or run the command that the README gives for it)")
    return [json.loads(line) for line in path.read_text().splitlines()]


def mechanism() -> plt.Figure:
    """D falls, r follows, r drives: three rows over log-spaced steps, one column a task."""
    cfg = config.Config()  # both are default runs
    fig, axes = plt.subplots(3, 2, figsize=(9, 5.4), sharex="col", sharey="row", height_ratios=(1, 0.8, 1.1))
    for column, (name, title) in zip(axes.T, (("sr", "super-resolution"), ("t2a", "captions"))):
        rows = rows_of(RESULTS / f"regime-{name}.jsonl")
        k = [r["step"] for r in rows]
        rising = next((r for r in rows if r["struct_active"] and r["r"] > 0), None)
        latched = rising and rising["step"] - round(0.1 * cfg.steps * rising["mu"] / (cfg.mu0 * rising["r"]))  # mu = mu0 r (k - latched) / 0.1 K: the log has mu
        column[0].plot(k, [r["D"] for r in rows], color="#1b1b1b")
        column[0].set_title(f"{title}: discrepancy D at t = 1")
        column[1].plot(k, [r["r"] for r in rows], color="#c1121f", drawstyle="steps-post")
        column[1].fill_between(k, 0, [r["r"] for r in rows], color="#c1121f", alpha=0.12, step="post")
        column[1].set_title("regime r: 0 acquires, 1 refines")
        most = lambda key: max(max(r[key] for r in rows), 1e-9)
        column[2].plot(k, [r["lambda"] / most("lambda") for r in rows], color="#1b1b1b", ls="-", drawstyle="steps-post", label="guidance weight lambda")
        m = np.array([r["m"] for r in rows])
        column[2].plot(k, (m - 1.5) / 0.5, color="#2a9d8f", ls="--", drawstyle="steps-post", label="sampler's centre m (1: 2.0, 0: 1.5)")
        column[2].plot(k, [r["mu"] / most("mu") for r in rows], color="#7a5c00", ls=":", lw=2.2, drawstyle="steps-post", label="structure weight mu")
        column[2].set_title("what r drives, as shares of its most")
        if latched:
            column[2].annotate("groups found", (latched, 0), (latched, 1.14), fontsize=7, ha="center", arrowprops={"arrowstyle": "-", "lw": 0.6})
        column[2].set_xscale("log", base=2)
        ticks = [2**j for j in range(4, 12, 2)] + [2_048]
        column[2].set_xticks(ticks, [str(x) for x in ticks])
        column[2].set_xlabel("training step")
    axes[0, 0].set_ylabel("D")
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylabel("r")
    axes[1, 0].set_ylim(0, 1.05)
    axes[2, 0].set_ylim(-0.05, 1.25)
    fig.legend(*axes[2, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return fig


def density() -> plt.Figure:
    """p(t) of training timesteps while r rises."""
    rows, t = rows_of(RESULTS / "regime-sr.jsonl"), torch.linspace(0.002, 0.998, 500)
    fig, ax = plt.subplots(figsize=(4.6, 2.8))
    moments = [rows[np.argmin([abs(r["r"] - want) for r in rows])] for want in (0.0, 0.33, 0.66, 1.0)]
    for r, grey, dash in zip(moments, ("#1b1b1b", "#555555", "#888888", "#b0b0b0"), ("-", "--", "-.", ":")):
        ax.plot(t, sampler.pdf(t, r["m"]), color=grey, ls=dash, label=f"step {r['step']}: r = {r['r']:.2f}, m = {r['m']:.2f}")
    ax.plot(t, sampler.pdf(t, sampler.REFERENCE_M), color="#c1121f", lw=1, label="reference, m = 0")
    ax.set(xlabel="t (0: data, 1: pure noise)", ylabel="p(t)", xlim=(0, 1), ylim=(0, None), title="Where training looks")
    ax.legend(loc="upper left")
    return fig


def blocks() -> plt.Figure:
    """Block similarities S, ordered by the groups found in them, early, in the middle, late."""
    rows = [r for r in rows_of(RESULTS / "regime-t2a-deep.jsonl") if "structure" in r]
    latched = next(r for r in rows if r["struct_active"] or r is rows[-1])
    fig, axes = plt.subplots(1, 3, figsize=(8.2, 2.9))
    for ax, r in zip(axes, (rows[len(rows) // 3], latched, rows[-1])):
        s = r["structure"]
        order = np.argsort(s["groups"], kind="stable")             # a group's blocks side by side
        S, groups = np.array(s["S"])[np.ix_(order, order)], np.array(s["groups"])[order]
        np.fill_diagonal(S, np.nan)
        image = ax.imshow(S, cmap="Greys", vmin=0, vmax=0.06)
        for g in sorted(set(groups)):
            start, n = np.flatnonzero(groups == g)[0] - 0.5, (groups == g).sum()
            ax.add_patch(plt.Rectangle((start, start), n, n, fill=False, ec="#c1121f", lw=1.6))
        ax.set_title(f"step {r['step']}: p = {s['p']:.3f}")
        ax.set_xticks(range(len(S)), order + 1)
        ax.set_yticks(range(len(S)), order + 1)
        ax.set_xlabel("block")
    axes[0].set_ylabel("block")
    fig.colorbar(image, ax=axes, label="similarity of weights", shrink=0.8)
    return fig


def found() -> list[Path]:
    """Folders of recorded main comparisons."""
    out = [RESULTS / name for name in TITLES if (RESULTS / name / "rows.jsonl").is_file()]
    if not out:
        raise UserError(f"{RESULTS}: no recorded E1; make one with: python experiments.py run E1 --out results/e1")
    return out


def curves() -> plt.Figure:
    """Learning curves of the main comparison."""
    folders = found()
    fig, axes = plt.subplots(1, len(folders), figsize=(4.4 * len(folders), 3.1), squeeze=False)
    for ax, folder in zip(axes[0], folders):
        rows, spec = rows_of(folder / "rows.jsonl"), json.loads((folder / "experiment.json").read_text())
        metric = next(m for m in experiments.QUALITY if m in rows[0])
        for arm in spec["arms"]:
            mine = experiments.curves(rows, arm, spec["seeds"], metric)
            if not mine:
                continue
            x, y = next(iter(mine.values()))[0], experiments.QUALITY[metric] * np.array([c[1] for c in mine.values()])
            mean, (lo, hi) = y.mean(0), np.array([experiments.interval(column)[1:] for column in y.T]).T
            color, dash = ARMS.get(arm, ("#444444", "-"))
            ax.plot(x, mean, color=color, ls=dash, label=arm)
            ax.fill_between(x, lo, hi, color=color, alpha=0.12, lw=0)
        ax.set(xlabel="training step", title=f"{TITLES[folder.name]}, {len(spec['seeds'])} seeds")
        ax.legend()
    return fig


def sooner() -> plt.Figure:
    """T_static / T_arm of the main comparison, in steps and in seconds."""
    folders = found()
    fig, axes = plt.subplots(1, len(folders), figsize=(4.4 * len(folders), 2.6), squeeze=False)
    for ax, folder in zip(axes[0], folders):
        rows = [r for r in json.loads((folder / "summary.json").read_text()) if r.get("speed_up_step", {}).get("n")]
        for k, (key, face, hatch) in enumerate((("speed_up_step", "#555555", ""), ("speed_up_seconds", "#d0d0d0", "//"))):
            y = np.arange(len(rows)) + 0.36 * k
            of = [r.get(key, {"ratio": np.nan, "interval": [np.nan, np.nan]}) for r in rows]  # seconds of another day are not compared
            ratio, ends = np.array([x["ratio"] for x in of]), np.array([x["interval"] for x in of])
            ax.barh(y, ratio, 0.34, color=face, hatch=hatch, edgecolor="#1b1b1b", lw=0.6, label=key.rpartition("_")[2].replace("step", "steps"))
            ax.errorbar(ratio, y, xerr=np.abs(ends.T - ratio), fmt="none", ecolor="#c1121f", capsize=2, lw=1)
        ax.axvline(1, color="#1b1b1b", lw=0.8)
        ax.set_yticks(np.arange(len(rows)) + 0.18, [r["arm"] for r in rows])
        ax.set(xlabel="times sooner than static (> 1: better)", title=TITLES[folder.name].split(":")[0].split(" (")[0], xlim=(0, None))
        ax.invert_yaxis()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return fig


def differences() -> plt.Figure:
    """Every arm of at least 8 seeds of every recorded experiment minus its reference, 95 %, turned so that better is to the right."""
    panels = {"captions (event sets right)": [], "super-resolution (minus the energy score)": []}
    for folder in sorted(p.parent for p in RESULTS.glob("e*/summary.json")):
        spec = json.loads((folder / "experiment.json").read_text())
        sr = next(iter(spec["arms"].values()))["task"] == "sr"
        panels[list(panels)[sr]] += [(f"{spec['experiment']}{' ESC-10' * ('esc10' in folder.name)}: {r['arm']} - {r['reference'].rpartition(': ')[2]}", (-1 if sr else 1) * np.array([r["against"]["difference"], *r["against"]["interval"]]))
                                     for r in json.loads((folder / "summary.json").read_text()) if "against" in r and r["n"] >= 8 and not spec["pilot"]]
    panels = {k: v for k, v in panels.items() if v}
    if not panels:
        raise UserError(f"{RESULTS}: no recorded experiment; make one with: python experiments.py run E1 --out results/e1")
    fig, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 0.9 + 0.24 * max(map(len, panels.values()))), squeeze=False)
    for ax, (title, compared) in zip(axes[0], panels.items()):
        for y, (name, (mean, *ends)) in enumerate(compared):
            ax.plot(sorted(ends), [y, y], color="#1b1b1b", lw=1.4)
            ax.plot(mean, y, "o", ms=5, color="#1b1b1b", mfc="#1b1b1b" if min(ends) > 0 or max(ends) < 0 else "white")
        ax.axvline(0, color="#c1121f", lw=0.8)
        ax.set_yticks(range(len(compared)), [name for name, _ in compared])
        ax.set(xlabel="difference, 95 % (filled: without 0; right: better)", title=title)
        ax.invert_yaxis()
    return fig


def sounds() -> plt.Figure:
    """Captions of the test split: the real clip above, the shipped model's below."""
    run, world = evaluate.load_run(ROOT / "assets" / "demo"), data.SoundWorld("test", 200).prepare()
    counts = [len(world.scene(i).events) for i in range(200)]
    chosen = [counts.index(1), counts.index(2), counts.index(2, counts.index(2) + 1), counts.index(3)]
    made = evaluate.generate(run, [world.caption(i) for i in chosen], chosen)
    fig, axes = plt.subplots(2, 4, figsize=(12, 4.2), sharex=True, sharey=True)
    for column, i, y in zip(axes.T, chosen, made):
        evaluate.draw_spectrogram(column[0], world.wave(i), world.caption(i))
        image = evaluate.draw_spectrogram(column[1], y, "")
        column[1].set_xlabel("time (s)")
    axes[0, 0].set_ylabel("real\nfrequency (kHz)")
    axes[1, 0].set_ylabel("model\nfrequency (kHz)")
    fig.colorbar(image, ax=axes, label="dB", shrink=0.7)
    return fig


FIGURES = {f.__name__: f for f in (mechanism, density, blocks, curves, sooner, differences, sounds)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("names", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    p.add_argument("--out", type=Path, default=ROOT / "assets")
    a = p.parse_args()
    unknown = [n for n in a.names if n not in FIGURES]
    if unknown:
        raise UserError(f"{unknown[0]}: no such figure; there are: {', '.join(FIGURES)}")
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.names or FIGURES:
        with plt.rc_context(STYLE):
            fig = FIGURES[name]()
            fig.savefig(a.out / f"{name}.png")
            plt.close(fig)
        print(a.out / f"{name}.png")


if __name__ == "__main__":
    run_cli(main)
