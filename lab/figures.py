"""The figures of README and docs, made from recorded results in one style that also reads in print and in
grey.

    python -m lab.figures                                  # all of them, to assets/ (a minute: one generates)
    python -m lab.figures mechanism curves --out figures/  # some

| figure | made from |
|---|---|
| mechanism | results/regime-sr.jsonl, results/regime-t2a.jsonl: D, r and what r drives, over training |
| density | results/regime-sr.jsonl: p(t) at four moments |
| blocks | results/regime-t2a-deep.jsonl: block similarities at three moments |
| regime | results/regime/default/: r of default runs over seeds and rates, beside measured progress |
| agreement | results/regime/recorded/: cosine of guidance's gradient by noise level, beside r |
| work | results/block-work.json: what blocks add, with and without the structure loss |
| curves | results/e1, e1-sr, e1-esc10, rows.jsonl: quality over steps, mean and 95 % interval over seeds |
| parts | results/e1-sr-dev/rows.jsonl: what `stage` changes, one thing at a time, minus `static` |
| sooner | results/e1, e1-sr, e1-esc10, summary.json: times fewer steps and seconds than `static` |
| differences | results/e*/summary.json: every arm of 8 seeds against its control, in one picture |
| sounds | assets/demo: captions nobody trained on, real clip beside the model's |
| decoder | assets/demo, assets/decoder.safetensors: round trips of clips by Griffin-Lim and by the decoder |

Each function in FIGURES reads its files and returns one matplotlib figure. A file that is missing is a
UserError with its name. Nothing is drawn at random, so the same results give the same pixels.

results/regime-sr.jsonl and regime-t2a.jsonl are lines of log.jsonl of default runs, regime-t2a-deep.jsonl of
`static` with eight blocks.

Public: FIGURES {name: function}.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import evaluate
import guidance
import sampler
from lab.griffin_lim import decode_by_griffin_lim
from lab.learning_curves import BLACK, BROWN, GREEN, RED, arm_styles, draw_arms, draw_differences
from lab.regime_choice import driven_r, r_of, read
from lab.tables import curve_metrics
from parts.arguments import Parser
from parts.config import Config
from parts.dashboard import steps_and_values
from parts.errors import UserError, run_cli
from parts.soundworld import SOUNDS, SoundWorld
from parts.spectrograms import draw_spectrogram, log_steps
from regime import hold_last

plt.switch_backend("Agg")  # files only, no window

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
         "axes.titlelocation": "left", "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8,
         "savefig.dpi": 130, "figure.constrained_layout.use": True}
GREYS = plt.get_cmap("Greys").with_extremes(bad="#cfe0f2")  # a diagonal that is left out is no 0
# E1 of the first reading, at 400 steps: folder of results -> title.
TITLES = {"e1": "captions", "e1-sr": "super-resolution", "e1-esc10": "super-resolution of ESC-10"}


def rows_of(path: Path) -> list[dict]:
    """Lines of a recorded .jsonl file."""
    if not path.is_file():
        raise UserError(f"{path}: missing; it is a recorded result of this project "
                        "(git checkout it, or run the command that docs/ gives for it)")
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_rows(name: str) -> list[dict]:
    """The lines about training steps of a recorded log."""
    path = RESULTS / f"regime-{name}.jsonl"
    rows = [row for row in rows_of(path) if "density" in row]
    if not rows:
        raise UserError(f"{path}: of an earlier version (no density of timesteps); record it anew")
    return rows


# --- one run, over training ---------------------------------------------------------------------------------

def mechanism() -> plt.Figure:
    """D falls, r follows its slope, r drives three curves: five rows over log-spaced steps, one column a
    task."""
    cfg = Config()
    fig, axes = plt.subplots(5, 2, figsize=(9, 6.6), sharex="col", sharey="row",
                             height_ratios=(1.1, 1.1, 0.8, 0.8, 0.8))
    for column, (name, title) in zip(axes.T, (("t2a", "CAPTIONS"), ("sr", "SUPER-RESOLUTION"))):
        rows = log_rows(name)
        steps, r = steps_and_values(rows, "r")
        column[0].plot(*steps_and_values(rows, "D"), color=BLACK)
        column[0].set_title(f"{title}\n", fontsize=8.5)
        column[1].plot(steps, r, color=RED, drawstyle="steps-post")
        column[1].fill_between(steps, 0, r, color=RED, alpha=0.12, step="post")
        for ax, (x, y) in zip(column[2:], driven_curves(rows)):
            ax.plot(x, y, color=GREEN, drawstyle="steps-post")
        _mark_groups(column[4], rows)
        column[4].set_xscale("log", base=2)
        ticks = [2**k for k in range(5, 12, 2)]
        column[4].set_xticks(ticks, [str(step) for step in ticks])
        column[4].set_xlabel("training step")

    said = ("CAPTIONS\nD: discrepancy between predicted and true sound, in a teacher's features",
            "regime r = 1 - (slope of D / its steepest): 0 acquires, 1 refines",
            f"guidance: weight lambda = {cfg.lambda0:g} (1 - r), off past r = {guidance.OFF_AT:g}",
            f"timesteps: centre m of p(t), {cfg.m_early:g} (more noise) at r = 0, {cfg.m_late:g} at r = 1",
            f"structure: share of the gradient, {cfg.struct_share:g} r once groups of blocks are found")
    labels = ("D", "r", "lambda", "m", "share")
    limits = ((0, 0.6), (0, 1.05), (-0.03, 1.1 * cfg.lambda0), (cfg.m_late - 0.1, cfg.m_early + 0.1),
              (-0.01, 1.1 * cfg.struct_share))
    for row, title, label, limit in zip(axes, said, labels, limits):
        row[0].set(ylabel=label, ylim=limit)
        row[0].set_title(title, fontsize=8.5)
    fig.align_ylabels(axes[:, 0])
    return fig


def driven_curves(rows: list[dict]) -> tuple:
    """What r drives: (steps, values) of lambda, m and the structure loss's share of the gradient, which is 0
    as long as the loss is off."""
    steps, densities = steps_and_values(rows, "density")
    m = [density["m"] for density in densities]
    share = [row.get("struct_share") if row.get("mu", 0) > 0 else 0.0 for row in rows]
    known = [(row["step"], value) for row, value in zip(rows, share) if value is not None]
    return steps_and_values(rows, "lambda"), (steps, m), tuple(zip(*known))


def _mark_groups(ax, rows: list[dict]) -> None:
    """When the groups were found, or that none were."""
    found = groups_found_at(rows)
    if found:
        ax.axvline(found, color=BLACK, lw=0.8, ls=":")
        ax.annotate("groups found", (found, 0.12), xytext=(3, 0), textcoords="offset points", fontsize=8)
    else:
        ax.text(0.02, 0.55, "off: too few blocks to test for groups", fontsize=8, transform=ax.transAxes)


def groups_found_at(rows: list[dict]) -> int | None:
    """The step of the check that accepted the groups: the last before the structure loss has a weight."""
    checked = None
    for row in rows:
        if row.get("mu", 0) > 0:
            return checked
        if "structure" in row:
            checked = row["step"]
    return None


def density() -> plt.Figure:
    """p(t) of training timesteps while r rises."""
    rows = log_rows("sr")
    t = torch.linspace(0.002, 0.998, 500)
    fig, ax = plt.subplots(figsize=(4.6, 2.8))
    moments = [min(rows, key=lambda row: abs(row["r"] - wanted)) for wanted in (0.0, 0.33, 0.66, 1.0)]
    styles = ((BLACK, "-"), ("#555555", "--"), ("#888888", "-."), ("#b0b0b0", ":"))
    for row, (grey, dash) in zip(moments, styles):
        p = sampler.LogitNormal(**row["density"])
        label = f"step {row['step']}: r = {row['r']:.2f}, m = {p.m:.2f}"
        ax.plot(t, p.pdf(t), color=grey, ls=dash, label=label)
    for name, m, dash in (("vanilla", 0.0, ":"), ("static", Config().m, "-")):
        ax.plot(t, sampler.LogitNormal(m).pdf(t), color=RED, lw=1, ls=dash, label=f"{name}: m = {m:g}")
    ax.set(xlabel="t (0: data, 1: pure noise)", ylabel="p(t)", xlim=(0, 1), ylim=(0, None),
           title="Density of training timesteps")
    ax.legend(loc="upper left", fontsize=7)
    return fig


def blocks() -> plt.Figure:
    """Block similarities S, ordered by the groups found in them: early, when the groups were accepted
    (where they were), and at the end."""
    rows = log_rows("t2a-deep")
    accepted, checks = groups_found_at(rows), [row for row in rows if "structure" in row]
    middle = [row for row in checks if row["step"] == accepted] or [checks[2 * len(checks) // 3]]
    moments = (checks[len(checks) // 3], middle[0], checks[-1])
    top = max(np.max(np.array(row["structure"]["S"]) - np.eye(len(row["structure"]["S"]))) for row in moments)
    fig, axes = plt.subplots(1, 3, figsize=(8.2, 2.9))
    for ax, row in zip(axes, moments):
        # A group's blocks side by side. The diagonal is 1 and would hide the rest.
        found = row["structure"]
        order = np.argsort(found["groups"], kind="stable")
        groups = np.array(found["groups"])[order]
        S = np.array(found["S"])[np.ix_(order, order)]                                         # (L, L)
        np.fill_diagonal(S, np.nan)
        image = ax.imshow(S, cmap=GREYS, vmin=0, vmax=top)
        for group in sorted(set(groups)):
            start = np.flatnonzero(groups == group)[0] - 0.5
            size = (groups == group).sum()
            ax.add_patch(plt.Rectangle((start, start), size, size, fill=False, ec=RED, lw=1.6))
        ax.set_title(f"step {row['step']}: p = {found['p']:.3f} (axes), {found['p_depth']:.3f} (depth)",
                     fontsize=8)
        ax.set_xticks(range(len(S)), order + 1)
        ax.set_yticks(range(len(S)), order + 1)
        ax.set_xlabel("block")
    axes[0].set_ylabel("block")
    fig.colorbar(image, ax=axes, label="similarity of weights", shrink=0.8)
    return fig


# --- several runs -------------------------------------------------------------------------------------------

TASKS = (("t2a", "captions"), ("sr", "super-resolution"))


def recorded(folder: str, task: str) -> list[tuple[dict, list[dict]]]:
    """(header, rows) of the files of lab.regime_choice in results/regime/FOLDER of a task."""
    files = sorted((RESULTS / "regime" / folder).glob("*.jsonl"))
    runs = [(header, rows) for header, rows in map(read, files) if header["task"] == task]
    if not runs:
        raise UserError(f"{RESULTS / 'regime' / folder}: no run of task {task}; lab/regime_choice.py has the "
                        "commands")
    return runs


def regime_band() -> plt.Figure:
    """r(k) of default runs: mean and range over seeds, half and double the rate, and measured progress."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for ax, (task, title) in zip(axes, TASKS):
        runs = recorded("default", task)
        last = min(header["steps"] for header, _ in runs)
        steps = np.unique(np.round(np.geomspace(32, last, 120)).astype(int))
        of_rate: dict[float, list] = {}
        progress = []
        for header, rows in runs:
            of_rate.setdefault(header["lr"], []).append(hold_last(*driven_r(rows), steps))
            points = [(row["step"], row["progress"]) for row in rows if "progress" in row]
            progress.append((header["lr"], points))
        default = max(of_rate, key=lambda rate: len(of_rate[rate]))
        for rate, many in of_rate.items():
            if rate == default:
                ax.fill_between(steps, np.min(many, 0), np.max(many, 0), color=RED, alpha=0.18, step="post",
                                lw=0, label=f"r, range of {len(many)} seeds")
                ax.step(steps, np.mean(many, 0), where="post", color=RED, label="r, mean")
            else:
                ax.step(steps, many[0], where="post", color=BROWN, lw=1.1, ls="--" if rate < default else ":",
                        label=f"r, {rate / default:g} x the learning rate")
        same = [points for rate, points in progress if rate == default]
        at = [step for step, _ in same[0]]
        values = np.array([[value for _, value in points] for points in same])
        ax.errorbar(at, values.mean(0), yerr=values.std(0, ddof=1), fmt="o", ms=3.5, color=BLACK, lw=0.8,
                    capsize=2, label="measured progress, standard deviation over seeds")
        ax.set(title=title, xlabel="training step", xlim=(steps[0], 1.06 * last), ylim=(-0.03, 1.03))
        log_steps(ax)
    axes[0].set_ylabel("r (0 acquires, 1 refines)\nprogress (1: the codec's ceiling)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return fig


def agreement() -> plt.Figure:
    """Cosine of the gradients of guidance (constant) and flow matching, by noise level, mean and range over
    runs, and r."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for ax, (task, title) in zip(axes, TASKS):
        runs = recorded("recorded", task)
        greys = plt.cm.Greys(np.linspace(0.35, 1, 5))
        measured = [{row["step"]: row["agreement_t"] for row in rows if "agreement_t" in row}
                    for _, rows in runs]
        steps = sorted(set.intersection(*map(set, measured)))
        for k, (level, grey) in enumerate(zip(measured[0][steps[0]], greys)):
            cosines = np.array([[of_run[step][level] for step in steps] for of_run in measured])  # (runs, n)
            mean = cosines.mean(0)
            ends = np.abs([cosines.min(0) - mean, cosines.max(0) - mean])
            beside = np.array(steps) * 2 ** (0.06 * (k - 2))       # side by side, so that all can be seen
            ax.errorbar(beside, mean, yerr=ends, fmt="o-", ms=3, lw=1, elinewidth=0.6, color=grey,
                        label=f"cosine at t = {level}")
        every = np.unique(np.round(np.geomspace(min(steps), max(steps), 200)).astype(int))
        r = [hold_last(*r_of(rows, Config().regime_signal), every) for _, rows in runs]
        ax.step(every, np.mean(r, 0), where="post", color=RED, label="r, mean of the runs")
        ax.axhline(0, color=BLACK, lw=0.7)
        ax.set(title=f"{title}, {len(runs)} runs", xlabel="training step")
        ax.set_xscale("log", base=2)
        ax.set_xticks(steps, [str(step) for step in steps], rotation=45)
    axes[0].set_ylabel("cosine; r")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return fig


def work() -> plt.Figure:
    """Mean cos^2 between what blocks add to the stream, one matrix a run."""
    file = RESULTS / "block-work.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; make it with: python -m lab.block_work")
    runs = json.loads(file.read_text())
    fig, axes = plt.subplots(1, len(runs), figsize=(3.4 * len(runs), 3.6), squeeze=False)
    top = max(np.max(np.array(run["cos2"]) - np.eye(run["depth"])) for run in runs.values())
    for ax, run in zip(axes[0], runs.values()):
        matrix = np.array(run["cos2"])
        np.fill_diagonal(matrix, np.nan)
        image = ax.imshow(matrix, cmap=GREYS, vmin=0, vmax=top)
        edges = np.flatnonzero(np.diff(run["groups"])) + 0.5
        for edge in edges:
            ax.axhline(edge, color=RED, lw=1.2)
            ax.axvline(edge, color=RED, lw=1.2)
        how = "no structure loss" if run["structure"] == "off" else f"structure loss, {run['struct_loss']}"
        ax.set_title(f"{how}\nbetween groups {run['between_groups']:.3f}")
        ax.set_xticks(range(run["depth"]), range(1, run["depth"] + 1))
        ax.set_yticks(range(run["depth"]), range(1, run["depth"] + 1))
        ax.set_xlabel("block")
    axes[0, 0].set_ylabel("block")
    fig.colorbar(image, ax=axes, label="mean cos^2 of what blocks add", shrink=0.8)
    return fig


# --- experiments --------------------------------------------------------------------------------------------

def main_comparisons() -> list[Path]:
    """Folders of E1 of the first reading."""
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
        draw_arms(ax, rows, spec["arms"], curve_metrics(rows)[0], arm_styles(spec["arms"]))
        last = max(row["step"] for row in rows)
        ax.set_title(f"{TITLES[folder.name]}, {len(spec['seeds'])} seeds, {last:,} steps", fontsize=8.5)
        ax.legend()
    return fig


def sooner() -> plt.Figure:
    """T_static / T_arm of the main comparison, in steps and in seconds, and of how many seeds: the others
    share no quality with `static`."""
    folders = main_comparisons()
    fig, axes = plt.subplots(1, len(folders), figsize=(4.4 * len(folders), 2.6), squeeze=False)
    for ax, folder in zip(axes[0], folders):
        summary = json.loads((folder / "summary.json").read_text())
        compared = [row for row in summary if "sooner" in row]
        rows = [{"arm": row["arm"], **next(iter(row["sooner"].values()))} for row in compared]
        _draw_speed_ups(ax, rows, 0, "step", "steps", "#555555", "")
        _draw_speed_ups(ax, rows, 1, "seconds", "seconds", "#d0d0d0", "//")
        ax.axvline(1, color=BLACK, lw=0.8)
        names = [f"{row['arm']}\n{row['step']['n']} of {row['step']['of']} seeds" for row in rows]
        ax.set_yticks(np.arange(len(rows)) + 0.18, names)
        ax.set(xlabel="speed-up over static (> 1: faster)", xlim=(0, None),
               title=TITLES[folder.name], ylim=(len(rows) - 0.35, -0.35))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return fig


def _draw_speed_ups(ax, rows: list[dict], k: int, key: str, label: str, face: str, hatch: str) -> None:
    """The k-th bar of each arm, or why there is none."""
    y = np.arange(len(rows)) + 0.36 * k
    unknown = {"ratio": np.nan, "interval": [np.nan, np.nan]}
    ratio = np.array([row.get(key, unknown)["ratio"] for row in rows], float)
    ends = np.array([row.get(key, unknown)["interval"] for row in rows], float)                # (arms, 2)
    for at, row in zip(y, rows):
        why = "never in reach of static" if key in row else "run on another day: not compared"
        if not row.get(key, {}).get("n"):
            ax.text(0.02, at, why, fontsize=7, va="center")
    ax.barh(y, ratio, 0.34, color=face, hatch=hatch, edgecolor=BLACK, lw=0.6, label=label)
    ax.errorbar(ratio, y, xerr=np.abs(ends.T - ratio), fmt="none", ecolor=RED, capsize=2, lw=1)


def parts_of_stage() -> plt.Figure:
    """Super-resolution at full length: each arm minus `static` of the same seed, a line a seed."""
    rows = rows_of(RESULTS / "e1-sr-dev" / "rows.jsonl")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, metric in zip(axes, ("energy_score", "lsd_hf")):
        draw_differences(ax, rows, dict.fromkeys(arms), "static", metric, arm_styles(arms))
        log_steps(ax)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return fig


def differences() -> plt.Figure:
    """Every arm of at least 8 seeds of every recorded experiment minus its reference, 95 %, as in the tables:
    of event sets, where more is better, and of energy scores, where less is."""
    panels = {"captions: event sets right\n(right of 0: better)": [],
              "super-resolution: energy score\n(left of 0: better)": []}
    for folder in sorted(path.parent for path in RESULTS.glob("e*/summary.json")):
        spec = json.loads((folder / "experiment.json").read_text())
        sr = next(iter(spec["arms"].values())).get("task") == "sr"
        panels[list(panels)[sr]] += _compared(folder, spec)
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
        ax.set(xlabel="difference, 95 % (filled: without 0)", title=title)
        ax.invert_yaxis()
    return fig


# What an arm's name does not say outside its experiment's table.
WORDS = {"E2": {"none": "timesteps constant alone"},
         "E3": {"slope": "stage", "random": "stage with r at random times"},
         "E4": {"tiny": "shipped teacher", "random": "untrained teacher", "none": "no guidance",
                "shuffled": "features of other clips"}}


def _compared(folder: Path, spec: dict) -> list[tuple]:
    """(name, [difference, its interval's ends]) of each arm of an experiment that has enough seeds."""
    if spec["pilot"]:
        return []
    experiment = spec["experiment"] + (" ESC-10" if "esc10" in folder.name else "")
    words = WORDS.get(spec["experiment"], {})
    steps = next(iter(spec["arms"].values()))["steps"]
    if steps > 400:
        experiment += f", {steps:,} steps"
    compared = []
    for row in json.loads((folder / "summary.json").read_text()):
        if "against" in row and row["against"]["n"] >= 8:
            reference = row["reference"].rpartition(": ")[2]
            numbers = np.array([row["against"]["difference"], *row["against"]["interval"]], float)
            arm, other = (words.get(name, name) for name in (row["arm"], reference))
            compared.append((f"{experiment}: {arm} - {other}", numbers))
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
    fig.colorbar(image, ax=axes, label="dB re full scale", shrink=0.7)
    return fig


def decoder() -> plt.Figure:
    """Test clips of four classes, each alone: real, and the same latents decoded by two means."""
    codec, world = evaluate.load_run(ROOT / "assets" / "demo").codec, SoundWorld("test", 200).prepare()
    alone = [i for i in range(200) if len(world.scene(i).events) == 1]
    sound_of = {SOUNDS[world.scene(i).events[0].sound].name: i for i in reversed(alone)}
    chosen = [sound_of[name] for name in ("cricket", "dog", "glass", "rain")]
    real = torch.from_numpy(np.stack([world.wave(i) for i in chosen]))
    z = codec.encode(real)
    rows = {"real": real, "Griffin-Lim": decode_by_griffin_lim(codec, z), "decoder": codec.decode(z)}

    fig, axes = plt.subplots(3, 4, figsize=(12, 6), sharex=True, sharey=True)
    for line, (name, waves) in zip(axes, rows.items()):
        line[0].set_ylabel(f"{name}\nfrequency (kHz)")
        for ax, i, wave in zip(line, chosen, waves):
            image = draw_spectrogram(ax, wave.numpy(), world.caption(i) if name == "real" else "")
    for ax in axes[-1]:
        ax.set_xlabel("time (s)")
    fig.colorbar(image, ax=axes, label="dB re full scale", shrink=0.7)
    return fig


# --- command ------------------------------------------------------------------------------------------------

FIGURES = {"mechanism": mechanism, "density": density, "blocks": blocks, "regime": regime_band,
           "agreement": agreement, "work": work, "curves": learning_curves, "sooner": sooner,
           "parts": parts_of_stage, "differences": differences, "sounds": sounds, "decoder": decoder}


def main() -> None:
    parser = Parser(__doc__)
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
