"""Both axes of quality at once: where the arms of an experiment lie, and what can be said of each.

    captions           event sets (higher is better), energy score of texture (lower is better); at w = 1, and
                       at the guidance scale that each run chose on validation clips (lab/axes.py)
    super-resolution   energy score of the high band, LSD-HF (lower is better)

An arm wins against its reference if it is better on one axis and not worse on the other; it trades if it is
better on one and worse on the other. Better and worse mean that the 95 % t interval of the paired difference
over seeds excludes 0; fewer than 8 seeds are descriptive: nothing is said of them.

Comes in: rows of an experiment (lab/tables.py). Goes out: dicts, a table, a figure.

Public: plane, verdict, plane_table, plane_figure.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from lab.learning_curves import arm_styles, axis_label
from lab.questions import reference_of
from lab.statistics import format_interval, interval, paired
from lab.tables import METRICS
from parts.spectrograms import pyplot, write_figure

CAPTIONS, RESTORED = ("event_accuracy", "texture_score"), ("energy_score", "lsd_hf")
VIEWS = {"w1": "w = 1", "tuned": "tuned w", "final": "final table"}


def _points(rows: list[dict]) -> dict:
    """{view: (axes, {arm: {seed: (a, b)}})} of finished runs."""
    views = {}
    for row in rows:
        found = {view: (CAPTIONS, row["axes"][view]) for view in ("w1", "tuned") if row.get("axes")}
        if "energy_score" in row.get("final", {}):
            found["final"] = RESTORED, row["final"]
        for view, (axes, values) in found.items():
            points = views.setdefault(view, (axes, {}))[1]
            points.setdefault(row["arm"], {})[row["seed"]] = tuple(values[name] for name in axes)
    return views


def verdict(differences: list[tuple]) -> str:
    """(difference's interval, +1 or -1: which sign is good) of each axis -> wins | loses | trades | not told
    apart."""
    better, worse = False, False
    for (low, high), sign in differences:
        low, high = sorted((sign * low, sign * high))
        better |= low > 0
        worse |= high < 0
    if better and worse:
        return "trades"
    return "wins" if better else "loses" if worse else "not told apart"


def plane(rows: list[dict], arms: dict, reference: str) -> list[dict]:
    """A dict a view and arm: {"view", "arm", "n", "axes": [{"name", "mean", "interval"[, "against"]}]
    [, "reference", "verdict"]}. Fewer than two common seeds: no difference, no verdict."""
    out = []
    for view, (axes, points) in _points(rows).items():
        for arm in (arm for arm in arms if arm in points):
            mine, other = points[arm], reference_of(arm, arms, reference)
            row = {"view": view, "arm": arm, "n": len(mine), "axes": []}
            both = sorted(set(mine) & set(points.get(other, {}))) if other != arm else []
            for k, name in enumerate(axes):
                mean, low, high = interval([point[k] for point in mine.values()])
                axis = {"name": name, "mean": mean, "interval": [low, high]}
                if len(both) > 1:
                    axis["against"] = paired([mine[s][k] for s in both], [points[other][s][k] for s in both])
                row["axes"].append(axis)
            if len(both) > 1:
                signs = [METRICS[name][0] for name in axes]
                row["reference"] = other
                row["verdict"] = verdict([(axis["against"]["interval"], sign)
                                          for axis, sign in zip(row["axes"], signs)])
            out.append(row)
    return out


def plane_table(found: list[dict]) -> str:
    """plane as text."""
    lines = ["both axes, differences from the reference, 95 %, not adjusted for the number of arms and axes; "
             "wins: better on one, not shown to be worse on the other"]
    for row in found:
        cells = []
        for axis in row["axes"]:
            cell = f"{axis['name'].replace('_', ' ')} {axis['mean']:.3f}"
            if "against" in axis:
                d = axis["against"]
                cell += f" ({d['difference']:+.3f} {format_interval(d['interval'])})"
            cells.append(cell)
        said = ""
        if "verdict" in row:
            few = row["axes"][0]["against"]["n"] < 8
            said = ": descriptive" if few else f": {row['verdict']}"
        lines.append(f"{VIEWS[row['view']]:12s} {row['arm']:26s} n {row['n']}  {', '.join(cells)}{said}")
    return "\n".join(lines)


def plane_figure(path: Path, found: list[dict]) -> None:
    """A panel a view, an arm a point, with intervals from three seeds on; better is up and to the right."""
    plt, views = pyplot(), list(dict.fromkeys(row["view"] for row in found))
    styles = arm_styles(dict.fromkeys(row["arm"] for row in found))
    fig, panels = plt.subplots(1, len(views), figsize=(5 * len(views), 4.6), layout="constrained",
                               squeeze=False)
    for ax, view in zip(panels.flat, views):
        rows = [row for row in found if row["view"] == view]
        for k, row in enumerate(rows):
            (a, b), (color, _) = row["axes"], styles[row["arm"]]
            spread = [[abs(x - axis["mean"]) for x in axis["interval"]] for axis in (a, b)]
            errors = [np.array(each)[:, None] if row["n"] > 2 else None for each in spread]
            ax.errorbar(a["mean"], b["mean"], errors[1], errors[0], fmt="osD^v<>"[k % 7], color=color, ms=5,
                        lw=1, label=f"{row['arm']} (n = {row['n']})")
        axes = RESTORED if view == "final" else CAPTIONS
        for name, turn, set_label in zip(axes, (ax.invert_xaxis, ax.invert_yaxis),
                                         (ax.set_xlabel, ax.set_ylabel)):
            set_label(axis_label(name))
            if METRICS[name][0] < 0:
                turn()
        ax.set_title(VIEWS[view])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3 * len(views))
    fig.suptitle("Both axes of quality: better is up and to the right")
    write_figure(path, fig)
