"""The figure of an experiment: learning curves of its arms, and the same curves minus the reference's.

Late in training arms differ by a hundredth of what all of them gain early. So each axis of quality has two
panels: the curve itself, and its difference from the reference arm of the same seed, over the second half of
the doublings. Steps are drawn on a log axis, where equal distances are equal numbers of doublings.

From three runs on a curve is the mean over seeds with its 95 % Student-t band. Of fewer each run is a line:
the band of two seeds is eleven times as wide as that of eight with the same deviation, and says nothing.

Comes in: rows of an experiment (lab/tables.py). Goes out: a figure.

Public: axis_label, arm_styles, differences, draw_arms, draw_runs, draw_differences, basis, learning_figure;
BLACK, RED, GREEN, BROWN.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from lab.questions import EXPERIMENTS, reference_of
from lab.statistics import interval
from lab.tables import METRICS, curve_metrics
from parts.spectrograms import log_steps, pyplot, write_figure

BOUNDED = {  # measured besides, between 0 and 1 -> label of the axis
    "r": "regime r",
    "recall": "events detected (semantic)",
    "count": "count, of detected events (detail)",
    "pitch": "high or low, of detected events (detail)",
    "order": "order, of right sets (detail)",
}

BLACK, RED, GREEN, BROWN = "#1b1b1b", "#c1121f", "#2a9d8f", "#7a5c00"
# Colours differ in lightness too, and each has a dash of its own: either alone tells the arms apart.
ARMS = {"vanilla": ("#b0b0b0", ":"), "static": (BLACK, "-"), "stop": (BROWN, "-."),
        "clock": (GREEN, (0, (5, 1))), "stage": (RED, "--"), "permuted": ("#c77d9b", (0, (1, 1))),
        "infonoise": ("#4666b0", (0, (4, 1, 1, 1))), "curriculum": ("#7fa3d9", (0, (3, 3)))}
OTHERS = ("#4666b0", "#e09f3e", "#c77d9b", GREEN, BROWN, "#7fa3d9", "#b0b0b0")  # of arms without a style
DASHES = ("-", "--", ":", "-.")


def arm_styles(arms) -> dict:
    """{arm: (colour, dash)}: an arm of E1 looks the same in every figure; the others take what is left."""
    others = [arm for arm in arms if arm not in ARMS]
    styles = {arm: ARMS[arm] for arm in arms if arm in ARMS}
    for k, arm in enumerate(others):
        styles[arm] = OTHERS[k % len(OTHERS)], DASHES[k // len(OTHERS) % len(DASHES)]
    return styles


def axis_label(metric: str) -> str:
    """A metric as the label of an axis: what it is, and which way is better."""
    if metric in BOUNDED:
        return BOUNDED[metric]
    sign, name = METRICS[metric]
    return f"{name}\n({'higher' if sign > 0 else 'lower'} is better)"


def _curves(rows: list[dict], arm: str, metric: str) -> dict:
    """{seed: {step: row}} of an arm, of the rows that have a metric."""
    found = {}
    for row in rows:
        if row["arm"] == arm and row.get(metric) is not None:
            found.setdefault(row["seed"], {})[row["step"]] = row
    return found


def _common_steps(runs: list[dict]) -> list[int]:
    """The steps that all of some dicts {step: ...} have, in order."""
    return sorted(set.intersection(*map(set, runs))) if runs else []


def differences(rows: list[dict], arm: str, reference: str, metric: str) -> tuple[list[int], np.ndarray]:
    """An arm minus its reference of the same seed -> steps that all these runs have (n,), differences (seeds
    that both have, n)."""
    mine, other = _curves(rows, arm, metric), _curves(rows, reference, metric)
    both = sorted(set(mine) & set(other))
    steps = _common_steps([run for s in both for run in (mine[s], other[s])])
    values = [[mine[s][k][metric] - other[s][k][metric] for k in steps] for s in both]
    return steps, np.array(values, float).reshape(len(both), len(steps))


def draw_runs(ax, x, y: np.ndarray, label: str, color: str, dash="-") -> None:
    """Curves y (runs, n) at x (n,): the mean and its 95 % band, or a line a run where they are fewer than
    three."""
    if len(y) < 3:
        for k, run in enumerate(y):
            ax.plot(x, run, "o", ms=3, color=color)
            ax.plot(x, run, color=color, ls=dash, label=None if k else label)
        return
    mean, low, high = np.array([interval(column) for column in y.T]).T  # (n,) each
    ax.plot(x, mean, "o", ms=3, color=color)
    ax.plot(x, mean, color=color, ls=dash, label=label)
    if len(x) == 1:                                                     # a band has no width there
        ax.errorbar(x, mean, [mean - low, high - mean], fmt="none", color=color, capsize=3)
    ax.fill_between(x, low, high, color=color, alpha=0.12, lw=0)


def _apart(x: np.ndarray, k: int) -> np.ndarray:
    """Steps (n,) of the k-th arm; a single one is moved aside, where the arms' intervals would overlap."""
    return x * 1.02**k if len(x) == 1 else x


def draw_differences(ax, rows: list[dict], arms: dict, reference: str, metric: str, styles: dict) -> None:
    """Every arm minus its reference over the second half of the doublings."""
    for k, arm in enumerate(arms):
        other = reference_of(arm, arms, reference)
        if arm == other:
            continue
        steps, values = differences(rows, arm, other, metric)
        steps = np.array(steps)
        late = steps**2 >= max(steps, default=0) * min(steps, default=0)
        if values.size:
            x = _apart(steps[late], k)
            draw_runs(ax, x, values[:, late], f"{arm} (n = {len(values)})", *styles[arm])
    ax.axhline(0, color="black", lw=0.8)
    sign, name = METRICS[metric]
    ax.set(ylabel=f"{name},\nminus that of {reference}", xlabel="training step (latter doublings)")
    ax.set_title(f"{'above' if sign > 0 else 'below'} 0: better than {reference}", fontsize=9)


def draw_arms(ax, rows: list[dict], arms, metric: str, styles: dict, clock: str = "step") -> None:
    """All arms' curves of a metric over steps or seconds."""
    for k, arm in enumerate(arms):
        runs = list(_curves([r for r in rows if clock in r], arm, metric).values())
        steps = _common_steps(runs)
        if steps:
            x = np.mean([[run[k][clock] for k in steps] for run in runs], 0)        # (evaluations,)
            y = np.array([[run[k][metric] for k in steps] for run in runs], float)  # (runs, evaluations)
            draw_runs(ax, _apart(x, k), y, f"{arm} (n = {len(runs)})", *styles[arm])
    ax.set(ylabel=axis_label(metric), xlabel="training seconds (evaluation excluded)")
    if clock == "step":
        ax.set_xlabel("training step")
        log_steps(ax)
    if metric in BOUNDED:
        ax.set_ylim(-0.03, 1.03)


def basis(rows: list[dict], arms: dict) -> str:
    """What the curves are of: one number of seeds, or from the arm with the fewest to that with the most."""
    counts = {len({row["seed"] for row in rows if row["arm"] == arm}) for arm in arms} - {0}
    fewest, most = min(counts), max(counts)
    seeds = f"{most} seed{'s' * (most > 1)}"
    if fewest < most:
        seeds = f"{fewest} to {seeds}"
    if most < 8:
        return f"{seeds}: descriptive"
    return f"{seeds}; bands: 95 %" + "; arms of fewer than 8 seeds are descriptive" * (fewest < 8)


def learning_figure(path: Path, name: str, rows: list[dict], arms: dict, reference: str) -> None:
    """Write the figure of an experiment: quality over steps and seconds, r, for captions each factor alone,
    and each axis of quality minus the reference's."""
    qualities = curve_metrics(rows)
    if not qualities:
        return
    panels = [(metric, "step") for metric in qualities]
    if any("seconds" in row for row in rows):
        panels.append((qualities[0], "seconds"))
    # Where nothing follows r it is 0: unused, not measured.
    with_r = [arm for arm in arms if any(row["arm"] == arm and row.get("r") for row in rows)]
    if with_r:
        panels.append(("r", "step"))
    for factor in ("recall", "count", "pitch", "order"):
        if any(row.get(factor) is not None for row in rows):
            panels.append((factor, "step"))
    total = len(panels) + len(qualities)

    # Four panels in a line at most.
    lines = -(-total // 4)
    columns = -(-total // lines)
    plt = pyplot()
    fig, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.8 * lines + 0.6), layout="constrained",
                             squeeze=False)
    for ax in axes.flat[total:]:
        ax.axis("off")
    styles = arm_styles(arms)
    for ax, (metric, clock) in zip(axes.flat, panels):
        draw_arms(ax, rows, with_r if metric == "r" else arms, metric, styles, clock)
    for ax, metric in zip(axes.flat[len(panels):], qualities):
        draw_differences(ax, rows, arms, reference, metric, styles)
        log_steps(ax)

    # The legend takes the empty place at the end, where there is one.
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if total < axes.size:
        axes.flat[-1].legend(handles, labels, loc="center", fontsize=8, ncol=2 if len(labels) > 16 else 1,
                             frameon=False)
    else:
        axes.flat[0].legend(handles, labels, fontsize=8)
    fig.suptitle(f"{name}: {EXPERIMENTS[name].question} Validation clips; {basis(rows, arms)}")
    write_figure(path, fig)
