"""Which arm is best at which step, on which axis: table and figure of E9, constant densities of timesteps.

If one density is the best at every step there is nothing that a schedule, whatever drives it, could follow.
If the best one moves with the steps, that is the order in which a schedule should go.

Comes in: rows of an experiment (lab/tables.py). Goes out: {axis: a list, a dict an evaluation step}: the best
arm by the mean over seeds, its value, and the arms that can't be told from it: the 95 % t interval of the
paired difference holds 0. With one seed there are no intervals, and nothing is said to be like it. The best
of several was selected: its value and its lead over the next are biased upwards.

Public: best_by_step, best_table, best_figure.
"""
from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from lab.statistics import paired
from lab.tables import METRICS
from parts.spectrograms import log_steps, pyplot, write_figure


def _values(rows: list[dict], metric: str) -> dict:
    """{step: {arm: {seed: value}}} of the rows that have a metric, turned so that higher is better."""
    sign, values = METRICS[metric][0], {}
    for row in rows:
        if row.get(metric) is not None:
            values.setdefault(row["step"], {}).setdefault(row["arm"], {})[row["seed"]] = sign * row[metric]
    return values


def _alike(best: dict, other: dict) -> bool:
    """Can an arm {seed: value} not be told from the best one over the seeds that both have?"""
    both = sorted(set(best) & set(other))
    if len(both) < 2:
        return False
    return paired([best[s] for s in both], [other[s] for s in both])["interval"][0] <= 0


def best_by_step(rows: list[dict]) -> dict:
    """See the top of this file. Only arms that have all seeds of the arm with the most are compared."""
    found = {}
    for metric, (sign, _) in METRICS.items():
        for step, arms in sorted(_values(rows, metric).items()):
            seeds = max(map(len, arms.values()))
            whole = {arm: by_seed for arm, by_seed in arms.items() if len(by_seed) == seeds}
            means = {arm: float(np.mean(list(by_seed.values()))) for arm, by_seed in whole.items()}
            best = max(means, key=means.get)
            alike = [arm for arm in whole if arm != best and _alike(whole[best], whole[arm])]
            found.setdefault(metric, []).append({
                "step": step, "best": best, "value": sign * means[best], "arms": len(whole), "seeds": seeds,
                "alike": alike, "behind": {arm: means[best] - mean for arm, mean in means.items()}})
    return found


def best_table(found: dict) -> str:
    """best_by_step as text: a line an axis and step."""
    lines = ["best arm at each evaluation step; in brackets how many of the others can't be told from it"]
    for metric, steps in found.items():
        lines.append(f"{METRICS[metric][1]}:")
        for at in steps:
            second = sorted(at["behind"].values())[1:2]
            ahead = f", {second[0]:.3f} ahead of the next" if second else ""
            alike = f" [{len(at['alike'])} of {at['arms'] - 1}]" if at["seeds"] > 1 else ""
            lines.append(f"  step {at['step']:5d}  {at['best']:16s} {at['value']:6.3f}{ahead}{alike}")
    return "\n".join(lines)


def best_figure(path: Path, found: dict, arms: list[str], seeds: int) -> None:
    """How far each arm's mean is behind the best at each step, one panel an axis; of arms named "m 1, s 2" m
    is the colour and s the dash. found: of best_by_step."""
    plt = pyplot()
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), layout="constrained",
                             squeeze=False)
    settings = [arm.partition(", ")[::2] for arm in arms]
    first, second = (list(dict.fromkeys(values)) for values in zip(*settings))
    colour_of = dict(zip(first, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(first)))))
    dash_of = dict(zip(second, itertools.cycle(("-", "--", ":", "-."))))
    for ax, (metric, steps) in zip(axes.flat, found.items()):
        for arm, (m, s) in zip(arms, settings):
            points = [(at["step"], -at["behind"][arm]) for at in steps if arm in at["behind"]]
            if points:
                ax.plot(*zip(*points), color=colour_of[m], ls=dash_of[s], marker="o", ms=3, lw=1.2, label=arm)
        log_steps(ax)
        ax.set(title=METRICS[metric][1], xlabel="training step", ylabel="behind the best (0: best)")
        ax.axhline(0, color="0.6", lw=0.6)
    for ax in axes.flat[len(found):]:
        ax.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), fontsize=8)
    fig.suptitle(f"Which constant density of timesteps is best when? Validation clips, "
                 f"{seeds} seed{'s' * (seeds > 1)}{': descriptive' * (seeds < 8)}")
    write_figure(path, fig)
