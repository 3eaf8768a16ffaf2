"""The figures of README and docs, made from recorded results in one style that also reads in print and in
grey.

    python -m lab.figures                                  # all of them, to assets/ (a minute: one generates)
    python -m lab.figures mechanism curves --out figures/  # some

| figure | made from |
|---|---|
| mechanism | results/regime-sr.jsonl, results/regime-t2a.jsonl: D, r and what r drives, over training |
| density | results/regime-sr.jsonl: p(t) at four moments |
| blocks | results/regime-t2a-deep.jsonl: block similarities at three moments |
| curves | results/e1*/rows.jsonl: quality over steps, mean and 95 % interval over seeds |
| sooner | results/e1*/summary.json: how many times fewer steps and seconds than `static` |
| differences | results/e*/summary.json: every arm against its control, in one picture |
| sounds | assets/demo: captions nobody trained on, real clip beside the model's |

Each function below is one figure: it reads its files, and returns the matplotlib figure. A file that is
missing is a UserError with its name. Nothing is drawn at random, so the same results give the same pixels.

Public: FIGURES {name: function}, and the functions.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import evaluate
import sampler
from lab.statistics import interval
from lab.tables import QUALITY, curves
from parts.config import Config
from parts.errors import UserError, run_cli
from parts.soundworld import SoundWorld
from parts.spectrograms import draw_spectrogram

plt.switch_backend("Agg")  # files only, no window

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
         "axes.titlelocation": "left", "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8,
         "savefig.dpi": 130, "figure.constrained_layout.use": True}
BLACK, RED, GREEN, BROWN = "#1b1b1b", "#c1121f", "#2a9d8f", "#7a5c00"
# Colours differ in lightness too, and each has a dash of its own: either alone tells the arms apart.
ARMS = {"vanilla": ("#b0b0b0", ":"), "static": (BLACK, "-"), "stop": (BROWN, "-."),
        "clock": (GREEN, (0, (5, 1))), "stage": (RED, "--")}
# Main comparisons: folder of results -> title.
TITLES = {"e1": "captions: event-set accuracy", "e1-sr": "super-resolution: LSD-HF (lower is better)",
          "e1-esc10": "super-resolution of ESC-10 (lower is better)"}


def rows_of(path: Path) -> list[dict]:
    """Lines of a recorded .jsonl file."""
    if not path.is_file():
        raise UserError(f"{path}: missing; it is a recorded result of this project "
                        "(git checkout it, or run the command that docs/ gives for it)")
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- one run, over training ---------------------------------------------------------------------------------

def mechanism() -> plt.Figure:
    """D falls, r follows, r drives: three rows over log-spaced steps, one column a task."""
    fig, axes = plt.subplots(3, 2, figsize=(9, 5.4), sharex="col", sharey="row", height_ratios=(1, 0.8, 1.1))
    for column, name, title in zip(axes.T, ("sr", "t2a"), ("super-resolution", "captions")):
        rows = rows_of(RESULTS / f"regime-{name}.jsonl")
        steps = [row["step"] for row in rows]
        column[0].plot(steps, [row["D"] for row in rows], color=BLACK)
        column[0].set_title(f"{title}: discrepancy D at t = 1")
        r = [row["r"] for row in rows]
        column[1].plot(steps, r, color=RED, drawstyle="steps-post")
        column[1].fill_between(steps, 0, r, color=RED, alpha=0.12, step="post")
        column[1].set_title("regime r: 0 acquires, 1 refines")
        _draw_driven(column[2], rows, steps)
    axes[0, 0].set_ylabel("D")
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylabel("r")
    axes[1, 0].set_ylim(0, 1.05)
    axes[2, 0].set_ylim(-0.05, 1.25)
    fig.legend(*axes[2, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return fig


def _draw_driven(ax, rows: list[dict], steps: list[int]) -> None:
    """lambda, m and mu over steps, as shares, and when the groups were found."""
    ax.plot(steps, _shares(rows, "lambda"), color=BLACK, ls="-", drawstyle="steps-post",
            label="guidance weight lambda")
    m = np.array([row["m"] for row in rows])
    ax.plot(steps, (m - 1.5) / 0.5, color=GREEN, ls="--", drawstyle="steps-post",
            label="sampler's centre m (1: 2.0, 0: 1.5)")
    ax.plot(steps, _shares(rows, "mu"), color=BROWN, ls=":", lw=2.2, drawstyle="steps-post",
            label="structure weight mu")
    ax.set_title("what r drives, as shares of its most")
    found = _groups_found_at(rows)
    if found:
        ax.annotate("groups found", (found, 0), (found, 1.14), fontsize=7, ha="center",
                    arrowprops={"arrowstyle": "-", "lw": 0.6})
    ax.set_xscale("log", base=2)
    ticks = [2**k for k in range(4, 12, 2)] + [2_048]
    ax.set_xticks(ticks, [str(step) for step in ticks])
    ax.set_xlabel("training step")


def _shares(rows: list[dict], key: str) -> list[float]:
    """A column of a log as shares of its maximum."""
    most = max(max(row[key] for row in rows), 1e-9)
    return [row[key] / most for row in rows]


def _groups_found_at(rows: list[dict]) -> int | None:
    """The step at which the group detector became active, solved from a row of the log where mu is ramped in:
    mu = mu0 r (k - found) / 0.1 K. The runs are default ones."""
    cfg = Config()
    for row in rows:
        if row["struct_active"] and row["r"] > 0:
            return row["step"] - round(0.1 * cfg.steps * row["mu"] / (cfg.mu0 * row["r"]))
    return None


def density() -> plt.Figure:
    """p(t) of training timesteps while r rises."""
    rows = rows_of(RESULTS / "regime-sr.jsonl")
    t = torch.linspace(0.002, 0.998, 500)
    fig, ax = plt.subplots(figsize=(4.6, 2.8))
    moments = [rows[np.argmin([abs(row["r"] - wanted) for row in rows])] for wanted in (0.0, 0.33, 0.66, 1.0)]
    styles = ((BLACK, "-"), ("#555555", "--"), ("#888888", "-."), ("#b0b0b0", ":"))
    for row, (grey, dash) in zip(moments, styles):
        ax.plot(t, sampler.pdf(t, row["m"]), color=grey, ls=dash,
                label=f"step {row['step']}: r = {row['r']:.2f}, m = {row['m']:.2f}")
    ax.plot(t, sampler.pdf(t, sampler.REFERENCE_M), color=RED, lw=1, label="reference, m = 0")
    ax.set(xlabel="t (0: data, 1: pure noise)", ylabel="p(t)", xlim=(0, 1), ylim=(0, None),
           title="Where training samples")
    ax.legend(loc="upper left")
    return fig


def blocks() -> plt.Figure:
    """Block similarities S, ordered by the groups found in them, early, in the middle, late."""
    rows = [row for row in rows_of(RESULTS / "regime-t2a-deep.jsonl") if "structure" in row]
    active = [row for row in rows if row["struct_active"]] or rows[-1:]
    fig, axes = plt.subplots(1, 3, figsize=(8.2, 2.9))
    for ax, row in zip(axes, (rows[len(rows) // 3], active[0], rows[-1])):
        # A group's blocks side by side. The diagonal is 1 and would hide the rest.
        found = row["structure"]
        order = np.argsort(found["groups"], kind="stable")
        groups = np.array(found["groups"])[order]
        S = np.array(found["S"])[np.ix_(order, order)]                                         # (L, L)
        np.fill_diagonal(S, np.nan)
        image = ax.imshow(S, cmap="Greys", vmin=0, vmax=0.06)
        for group in sorted(set(groups)):
            start = np.flatnonzero(groups == group)[0] - 0.5
            size = (groups == group).sum()
            ax.add_patch(plt.Rectangle((start, start), size, size, fill=False, ec=RED, lw=1.6))
        ax.set_title(f"step {row['step']}: p = {found['p']:.3f}")
        ax.set_xticks(range(len(S)), order + 1)
        ax.set_yticks(range(len(S)), order + 1)
        ax.set_xlabel("block")
    axes[0].set_ylabel("block")
    fig.colorbar(image, ax=axes, label="similarity of weights", shrink=0.8)
    return fig


# --- experiments --------------------------------------------------------------------------------------------

def main_comparisons() -> list[Path]:
    """Folders of recorded main comparisons."""
    folders = [RESULTS / name for name in TITLES if (RESULTS / name / "rows.jsonl").is_file()]
    if not folders:
        raise UserError(f"{RESULTS}: no recorded E1; make one with: "
                        "python -m lab.experiments run E1 --out results/e1")
    return folders


def learning_curves() -> plt.Figure:
    """Learning curves of the main comparison: mean and 95 % interval over seeds."""
    folders = main_comparisons()
    fig, axes = plt.subplots(1, len(folders), figsize=(4.4 * len(folders), 3.1), squeeze=False)
    for ax, folder in zip(axes[0], folders):
        rows = rows_of(folder / "rows.jsonl")
        spec = json.loads((folder / "experiment.json").read_text())
        metric = next(name for name in QUALITY if name in rows[0])
        for arm in spec["arms"]:
            of_seeds = list(curves(rows, arm, spec["seeds"], metric).values())
            if not of_seeds:
                continue
            # `curves` turns quality so that higher is better; the second sign turns it back.
            steps = of_seeds[0][0]                                                             # (n,)
            quality = QUALITY[metric] * np.array([y for _, y in of_seeds])                     # (seeds, n)
            low, high = np.array([interval(column)[1:] for column in quality.T]).T             # (n,) each
            color, dash = ARMS.get(arm, ("#444444", "-"))
            ax.plot(steps, quality.mean(0), color=color, ls=dash, label=arm)
            ax.fill_between(steps, low, high, color=color, alpha=0.12, lw=0)
        ax.set(xlabel="training step", title=f"{TITLES[folder.name]}, {len(spec['seeds'])} seeds")
        ax.legend()
    return fig


def sooner() -> plt.Figure:
    """T_static / T_arm of the main comparison, in steps and in seconds."""
    folders = main_comparisons()
    fig, axes = plt.subplots(1, len(folders), figsize=(4.4 * len(folders), 2.6), squeeze=False)
    for ax, folder in zip(axes[0], folders):
        summary = json.loads((folder / "summary.json").read_text())
        rows = [row for row in summary if row.get("speed_up_step", {}).get("n")]
        _draw_speed_ups(ax, rows, 0, "speed_up_step", "steps", "#555555", "")
        _draw_speed_ups(ax, rows, 1, "speed_up_seconds", "seconds", "#d0d0d0", "//")
        ax.axvline(1, color=BLACK, lw=0.8)
        ax.set_yticks(np.arange(len(rows)) + 0.18, [row["arm"] for row in rows])
        ax.set(xlabel="times sooner than static (> 1: better)", xlim=(0, None),
               title=TITLES[folder.name].split(":")[0].split(" (")[0])
        ax.invert_yaxis()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return fig


def _draw_speed_ups(ax, rows: list[dict], k: int, key: str, label: str, face: str, hatch: str) -> None:
    """The k-th bar of each arm. An arm that ran on another day has no seconds to compare, and gets none."""
    y = np.arange(len(rows)) + 0.36 * k
    unknown = {"ratio": np.nan, "interval": [np.nan, np.nan]}
    ratio = np.array([row.get(key, unknown)["ratio"] for row in rows])
    ends = np.array([row.get(key, unknown)["interval"] for row in rows])                       # (arms, 2)
    ax.barh(y, ratio, 0.34, color=face, hatch=hatch, edgecolor=BLACK, lw=0.6, label=label)
    ax.errorbar(ratio, y, xerr=np.abs(ends.T - ratio), fmt="none", ecolor=RED, capsize=2, lw=1)


def differences() -> plt.Figure:
    """Every arm of at least 8 seeds of every recorded experiment minus its reference, 95 %, turned so that
    better is to the right."""
    panels = {"captions (event sets right)": [], "super-resolution (minus the energy score)": []}
    for folder in sorted(path.parent for path in RESULTS.glob("e*/summary.json")):
        spec = json.loads((folder / "experiment.json").read_text())
        sr = next(iter(spec["arms"].values()))["task"] == "sr"
        panels[list(panels)[sr]] += _compared(folder, spec, sr)
    panels = {title: compared for title, compared in panels.items() if compared}
    if not panels:
        raise UserError(f"{RESULTS}: no recorded experiment; make one with: "
                        "python -m lab.experiments run E1 --out results/e1")

    height = 0.9 + 0.24 * max(len(compared) for compared in panels.values())
    fig, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), height), squeeze=False)
    for ax, (title, compared) in zip(axes[0], panels.items()):
        for y, (_, (mean, *ends)) in enumerate(compared):
            without_zero = min(ends) > 0 or max(ends) < 0
            ax.plot(sorted(ends), [y, y], color=BLACK, lw=1.4)
            ax.plot(mean, y, "o", ms=5, color=BLACK, mfc=BLACK if without_zero else "white")
        ax.axvline(0, color=RED, lw=0.8)
        ax.set_yticks(range(len(compared)), [name for name, _ in compared])
        ax.set(xlabel="difference, 95 % (filled: without 0; right: better)", title=title)
        ax.invert_yaxis()
    return fig


def _compared(folder: Path, spec: dict, sr: bool) -> list[tuple]:
    """(name, [difference, its interval's ends]) of each arm of an experiment that has enough seeds. In
    super-resolution the metric is an energy score, where lower is better."""
    if spec["pilot"]:
        return []
    experiment = spec["experiment"] + (" ESC-10" if "esc10" in folder.name else "")
    sign = -1 if sr else 1
    compared = []
    for row in json.loads((folder / "summary.json").read_text()):
        if "against" in row and row["n"] >= 8:
            reference = row["reference"].rpartition(": ")[2]
            numbers = np.array([row["against"]["difference"], *row["against"]["interval"]])
            compared.append((f"{experiment}: {row['arm']} - {reference}", sign * numbers))
    return compared


# --- the shipped model --------------------------------------------------------------------------------------

def sounds() -> plt.Figure:
    """Captions of the test split: the real clip above, the shipped model's below."""
    run = evaluate.load_run(ROOT / "assets" / "demo")
    world = SoundWorld("test", 200).prepare()

    # The first scene of one event, the first two of two, the first of three.
    counts = [len(world.scene(i).events) for i in range(200)]
    first_pair = counts.index(2)
    chosen = [counts.index(1), first_pair, counts.index(2, first_pair + 1), counts.index(3)]
    made = evaluate.generate(run, [world.caption(i) for i in chosen], chosen)

    fig, axes = plt.subplots(2, 4, figsize=(12, 4.2), sharex=True, sharey=True)
    for column, i, wave in zip(axes.T, chosen, made):
        draw_spectrogram(column[0], world.wave(i), world.caption(i))
        image = draw_spectrogram(column[1], wave, "")
        column[1].set_xlabel("time (s)")
    axes[0, 0].set_ylabel("real\nfrequency (kHz)")
    axes[1, 0].set_ylabel("model\nfrequency (kHz)")
    fig.colorbar(image, ax=axes, label="dB", shrink=0.7)
    return fig


# --- command ------------------------------------------------------------------------------------------------

FIGURES = {"mechanism": mechanism, "density": density, "blocks": blocks, "curves": learning_curves,
           "sooner": sooner, "differences": differences, "sounds": sounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "assets")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        raise UserError(f"{unknown[0]}: no such figure; there are: {', '.join(FIGURES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        with plt.rc_context(STYLE):
            fig = FIGURES[name]()
            fig.savefig(args.out / f"{name}.png")
            plt.close(fig)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    run_cli(main)
