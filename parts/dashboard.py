"""dashboard.png of a run folder: how training went, on one page.

Three bands: losses and metrics above the regime and what it drives; the similarity of blocks and its groups
at three moments; the last previews. Everything comes from files of the run folder, so it can be drawn again
at any time, except the density of training timesteps, which the caller hands in.

Public: draw_dashboard, steps_and_values, why_no_similarity.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from parts.audio import read_wav
from parts.config import load_config
from parts.errors import printable
from parts.files import reading
from parts.peers import Binned
from parts.previews import QUICK_STEPS
from parts.runs import read_log
from parts.scoring import preview_clips
from parts.spectrograms import draw_spectrogram, log_steps, pyplot, write_figure


def draw_dashboard(path: Path, logit_normal) -> None:
    """Draw dashboard.png of a run folder from its log and its last previews: losses, the regime and what it
    drives, the blocks' grouping at three moments, sounds. UserError where there is no log.

    logit_normal(m, s, u): the density of training timesteps with a method pdf(t)."""
    rows = read_log(path)
    plt = pyplot()
    config = load_config(path)
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval" in row]

    checks = [row for row in train if "structure" in row]
    middle_band = 0.75 if checks else 0.06                 # a line of text where there is nothing to draw
    fig = plt.figure(figsize=(15, 5.5 * (2.35 + middle_band)), layout="constrained")
    top, middle, bottom = fig.subfigures(3, 1, height_ratios=(1.35, middle_band, 1))
    last = train[-1]["step"] if train else 0
    title = (f"{path}: {config['task']} on {config['data']}, recipe {config.get('recipe', '-')}, "
             f"{last} of {config['steps']} steps, seed {config['seed']}")
    fig.suptitle(printable(title), fontsize=11, parse_math=False)
    panels = top.subplots(2, 3)
    if train:
        _draw_loss(panels[0, 0], train, evals)
        _draw_loss_by_noise(panels[0, 1], evals)
        _draw_quick_metric(panels[0, 2], config, evals)
        _draw_regime(panels[1, 0], train)
        _draw_weights(panels[1, 1], train)
        _draw_density(panels[1, 2], train, logit_normal)
    _draw_structure(middle, config, checks)
    if evals:
        _draw_last_previews(bottom, path, evals[-1]["step"])

    write_figure(path / "dashboard.png", fig)


def steps_and_values(rows: list[dict], key: str) -> tuple[list, list]:
    """(steps, values) of the rows that hold a number under a key."""
    found = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in found], [row[key] for row in found]


def _draw_loss(ax, train: list[dict], evals: list[dict]) -> None:
    """Flow-matching loss of training, single batches and their running mean over a twentieth of the run, and
    of validation."""
    steps = np.array([row["step"] for row in train])
    loss = np.array([row["loss_fm"] for row in train])
    eval_steps = [row["step"] for row in evals]
    eval_loss = np.array([row["eval"]["val_loss"] for row in evals], float)        # null: it was not finite
    k = max(2, len(loss) // 20)
    ax.plot(steps, loss, color="0.8", lw=0.7, label="training, single batches")
    if len(loss) >= k:
        mean = np.convolve(loss, np.ones(k) / k, "valid")
        ax.plot(steps[k - 1 :], mean, color="C0", label=f"training, mean of {k}")
    ax.plot(eval_steps, eval_loss, "o-", color="C3", ms=4, label="validation (EMA, t uniform)")
    # The first batches would flatten the rest.
    ax.set_ylim(0.9 * np.nanmin([loss.min(), *eval_loss]),
                1.1 * np.nanmax([np.quantile(loss, 0.99), *eval_loss]))
    ax.set(title="flow-matching loss", xlabel="step", ylabel="mean squared velocity error")
    ax.legend(fontsize=8)


def _draw_loss_by_noise(ax, evals: list[dict]) -> None:
    """Validation loss in bins of t."""
    title = "validation loss by noise level (t = 1 is noise)"
    if evals:
        viridis = pyplot().cm.viridis
        steps = [row["step"] for row in evals]
        bins = np.array([row["eval"]["val_loss_t"] for row in evals], float)       # (evaluations, bins)
        n = bins.shape[1]
        for j in range(n):
            label = f"t = {(j + 0.5) / n:.2f}"
            ax.plot(steps, bins[:, j], "o-", ms=3, color=viridis(j / (n - 1)), label=label)
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(title=title, xlabel="step", ylabel="mean squared velocity error", yscale="log")


def _draw_quick_metric(ax, config: dict, evals: list[dict]) -> None:
    """The quick metric of the task (validation loss where there is none) and each factor of captions taken
    alone."""
    n = preview_clips(config, evals)
    names = {"event_accuracy": f"event-set accuracy, n = {n}", "lsd_hf": f"LSD-HF at 2 kHz, n = {n}"}
    shown = "val_loss"
    for name in names:
        if evals and name in evals[-1]["eval"]:
            shown = name
            break
    steps = [row["step"] for row in evals]
    values = [row["eval"][shown] for row in evals]
    ax.plot(steps, values, "o-", color="C1", label=shown.replace("_", " "))
    for k, factor in enumerate(("recall", "order", "count", "pitch")):
        points = [(row["step"], row["eval"][factor]) for row in evals if row["eval"].get(factor) is not None]
        if points:
            of = f" (n = {evals[-1]['eval']['order_n']})" if factor == "order" else ""
            ax.plot(*zip(*points), ".-", lw=0.8, color=f"{0.3 + 0.15 * k:.2f}", label=f"{factor} alone{of}")
    ax.legend(fontsize=7)
    title = "quick metric on validation clips"
    if shown in names:
        title += f", {QUICK_STEPS} integration steps"
    ax.set(title=title, xlabel="step", ylabel=names.get(shown, "validation loss"))
    if shown == "event_accuracy":
        ax.set_ylim(0, 1)


def _draw_regime(ax, train: list[dict]) -> None:
    """Discrepancy D at several t, and over it, on an axis of its own, the regime r."""
    limits = (max(10, train[0]["step"]), train[-1]["step"] + 1)
    ax.set(title="where training is", xlabel="step", xlim=limits)
    log_steps(ax)
    colors = {"t0.9": "0.4", "t0.7": "0.55", "t0.5": "0.7", "t1.0": "0.85", "sample": "C2"}
    for name, color in colors.items():
        points = [(row["step"], row["D_of"][name]) for row in train if name in row.get("D_of", {})]
        if points:
            what = "of a sample" if name == "sample" else f"at t = {name[1:]}"
            ax.plot(*zip(*points), ".-", ms=3, lw=0.8, color=color, label=f"D {what}")
    measured = any("D" in row for row in train)
    if measured:
        ax.plot(*steps_and_values(train, "D"), "o-", ms=3, color="C0", label="D, whose slope gives r")
    ax.set_ylabel("discrepancy D" if measured else "D: not measured by this recipe")
    other = ax.twinx()
    other.step(*steps_and_values(train, "r"), where="post", color="C3", lw=2)
    other.set(ylim=(0, 1.35), yticks=np.linspace(0, 1, 6))
    other.set_ylabel("regime r (0 acquires, 1 refines)", color="C3")
    if any("no_signal" in row for row in train):
        ax.text(0.02, 0.3, "no significant slope: r follows the clock", fontsize=8, transform=ax.transAxes)
    if measured:
        ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend over the curves
        ax.legend(fontsize=7, loc="upper center", ncol=2)


def _draw_weights(ax, train: list[dict]) -> None:
    """Loss weights lambda and mu, and the agreement of gradients where it was measured."""
    ax.plot(*steps_and_values(train, "lambda"), color="C2", label="lambda (guidance)")
    ax.plot(*steps_and_values(train, "mu"), color="C4", label="mu (structure)")
    ax.set(title="what r drives", xlabel="step", ylabel="loss weight", ylim=(-0.02, None))
    steps, agreement = steps_and_values(train, "agreement")
    if steps:
        other = ax.twinx()
        other.plot(steps, agreement, "o-", ms=3, color="0.4")
        ax.plot([], [], "o-", ms=3, color="0.4", label="cosine of the gradients of loss and guidance")
        other.axhline(0, color="0.7", lw=0.7)
        other.set_ylabel("cosine")
    # Below: a legend in the panel would lie on the cosines, which are on the other axis.
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _draw_density(ax, train: list[dict], logit_normal) -> None:
    """p(t) over training, from the logged densities."""
    t, columns = (torch.arange(100) + 0.5) / 100, []               # centres of 100 bins
    steps, densities = steps_and_values(train, "density")
    for fields in densities:
        density = Binned(**fields) if "shares" in fields else logit_normal(**fields)
        columns.append(density.pdf(t).numpy())
    image = ax.pcolormesh(steps, t.numpy(), np.stack(columns, 1), shading="nearest", vmin=0)
    normal = [(step, fields["m"]) for step, fields in zip(steps, densities) if "m" in fields]
    if normal:
        normal_steps, m = map(np.array, zip(*normal))
        ax.plot(normal_steps, 1 / (1 + np.exp(-m)), "w--", lw=1, label="median of p(t): sigmoid(m)")
        ax.legend(fontsize=7, loc="lower right", labelcolor="w", facecolor="k", framealpha=0.4)
    ax.set(title="density of training timesteps p(t)", xlabel="step", ylabel="t (1 is noise)")
    ax.figure.colorbar(image, ax=ax, label="p(t)")


def why_no_similarity(config: dict) -> str:
    """Why a run has no check of its blocks."""
    if config["structure"] != "adaptive":
        return f"--structure is {config['structure']}"
    if config["depth"] >= 6:
        return "the first check is at step 32"
    return f"groups among {config['depth']} blocks can't be told from depth; six or more are needed"


def _draw_structure(fig, config: dict, checks: list[dict]) -> None:
    """S and its groups at the first check, halfway, and the last; then p and the stability of the groups
    over all checks."""
    if not checks:
        fig.text(0.01, 0.5, f"groups of blocks: not measured ({why_no_similarity(config)})")
        return
    axes = fig.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    moments = [checks[0], checks[len(checks) // 2], checks[-1]]
    # One colour scale for all three: the largest similarity of two different blocks.
    top = 0.05
    for check in moments:
        S = np.array(check["structure"]["S"])
        top = max(top, np.abs(S - np.eye(len(S))).max())
    for ax, check in zip(axes, moments):
        image = _draw_similarity(ax, check["step"], check["structure"], top)
    fig.colorbar(image, ax=axes[:3], label="similarity S of blocks", shrink=0.8)

    ax = axes[3]
    steps = [check["step"] for check in checks]
    p = [check["structure"]["p"] for check in checks]
    rand_index = [check["structure"]["rand_index"] for check in checks]
    p_depth = [check["structure"]["p_depth"] for check in checks]
    ax.plot(steps, p, "o-", ms=3, label="p: weights in random bases")
    ax.plot(steps, p_depth, "^-", ms=3, color="C2", label="p: a model of depth")
    ax.plot(steps, rand_index, "s-", ms=3, color="0.6", label="Rand index with the check before")
    ax.axhline(0.05, color="C3", lw=0.7)
    accepted = [check["step"] for check in checks if check["structure"].get("accepted")]
    if accepted:
        ax.axvline(accepted[0], color="k", lw=1, ls=":", label="groups are accepted")
    ax.set(title="have the blocks converged to groups?", xlabel="step")
    log_steps(ax)
    ax.legend(fontsize=8)


def _draw_similarity(ax, step: int, structure: dict, top: float):
    """Matrix S with blocks sorted by group and lines between groups. Returns the image."""
    groups = np.array(structure["groups"])
    order = np.argsort(groups, kind="stable")
    S = np.array(structure["S"])
    S = np.where(np.eye(len(S)) > 0, np.nan, S)  # the diagonal is 1 and would hide the rest
    S = S[np.ix_(order, order)]
    image = ax.imshow(S, vmin=-top, vmax=top, cmap="RdBu_r")
    for edge in np.flatnonzero(np.diff(groups[order])) + 0.5:
        ax.axhline(edge, color="k", lw=1.5)
        ax.axvline(edge, color="k", lw=1.5)
    ax.set(
        title=f"step {step}: p = {structure['p']:.3f},\n{structure['streak']} checks in a row passed",
        xlabel="block, by group",
        xticks=range(len(S)),
        yticks=range(len(S)),
        xticklabels=order + 1,
        yticklabels=order + 1,
    )
    return image


def _draw_last_previews(fig, path: Path, step: int) -> None:
    """Real and generated clips of the last evaluation, from the files of draw_previews."""
    samples = path / "samples"
    with reading(samples, f"delete it, and resume the run: --resume {path}"):
        lines = (samples / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1]
        captions = [line.split(": ", 1)[1] for line in lines]
        real = [read_wav(samples / f"real-{k}.wav") for k in range(len(captions))]
        made = [read_wav(samples / f"step{step:06d}-{k}.wav") for k in range(len(captions))]
    grid = fig.subplots(2, len(captions), sharex=True, sharey=True, squeeze=False)
    for k, caption in enumerate(captions):
        draw_spectrogram(grid[0, k], real[k], caption)
        image = draw_spectrogram(grid[1, k], made[k], f"model, step {step}")
        grid[1, k].set_xlabel("time (s)", fontsize=8)
    grid[0, 0].set_ylabel("real\nfrequency (kHz)", fontsize=8)
    grid[1, 0].set_ylabel("generated\nfrequency (kHz)", fontsize=8)
    fig.colorbar(image, ax=grid, label="dB re full scale", shrink=0.8)
