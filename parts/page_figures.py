"""The figures on the page of a run (parts/page.py): curves over training with the band of default runs behind
them, the density of timesteps and the similarity of the blocks at each position of the slider.

They are made from the lines of log.jsonl: `train`, those of steps, and `evals`, those of evaluations. Paths
are those of parts/curves.py.

The band: where a further default run lies with 95 % probability, from recorded ones; results/bands.json
is made by `python -m lab.regime_choice normal`.

Public: AXES, BOX, Span, spans, last_value, r_is_used, panels_of, densities, similarity_at,
compare_with_band.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parts import curves
from parts.config import settings_not_default
from parts.curves import Series, StepAxis, make_panel
from parts.dashboard import steps_and_values
from parts.peers import Binned
from parts.previews import QUICK_STEPS, SAMPLED_TWICE
from parts.scoring import preview_clips

BANDS = Path(__file__).resolve().parents[1] / "results" / "bands.json"
NOT_OF_TRAINING = ("seed", "eval_every", "score_clips", "score_split", "judge", "sample_steps", "clap",
                   "audio_model", "guidance_scale")  # settings that move no curve of the band
BOX = {"left": curves.LEFT, "right": curves.RIGHT, "top": curves.TOP, "bottom": curves.BOTTOM,
       "width": curves.WIDTH, "height": curves.HEIGHT}
AXES = {  # of each task: (key of an evaluation, title, unit)
    "t2a": (("event_accuracy", "Semantic axis: event sets right", "share (1 is best)"),
            ("texture_score", "Fidelity axis: energy score of texture", "energy score (lower is better)")),
    "sr": (("energy_score", "Fidelity axis: energy score above 2 kHz", "energy score (lower is better)"),
           ("lsd_hf", "Spectral axis: LSD above 2 kHz", "decades (lower is better)")),
}


# --- what is shown at which position of the slider ----------------------------------------------------------

@dataclass
class Span:
    """A value that is shown from one position of the slider until another."""
    first: int
    until: int
    value: object


def spans(values: list, skip_none: bool = False) -> list[Span]:
    """The value of each position -> equal neighbours as one; skip_none: nothing at all if all are None."""
    if skip_none and all(value is None for value in values):
        return []
    found: list[Span] = []
    for k, value in enumerate(values):
        if found and found[-1].value == value:
            found[-1].until = k
        else:
            found.append(Span(k, k, value))
    return found


def last_value(rows: list[dict], step: int, key: str):
    """The last logged value under a key up to a step, or None."""
    values = [row[key] for row in rows if row["step"] <= step and row.get(key) is not None]
    return values[-1] if values else None


def r_is_used(rows: list[dict]) -> bool:
    """Was r measured in a run, or made by a clock? Else it stays 0 in the log and says nothing."""
    return any("D" in row or row.get("r") for row in rows)


# --- curves -------------------------------------------------------------------------------------------------

def panels_of(config: dict, train: list[dict], evals: list[dict], axis: StepAxis, band: dict) -> tuple:
    """-> (panels that have something to show, a sentence about those that have not)."""
    def logged(key: str) -> list[tuple]:
        return list(zip(*steps_and_values(train, key)))

    def evaluated(key: str) -> list[tuple]:
        return [(row["step"], row["eval"][key]) for row in evals if row["eval"].get(key) is not None]

    def from_zero(key: str) -> tuple[float, float]:
        highest = max([value for _, value in logged(key)], default=0)
        return -0.02 * (highest or 1), 1.1 * (highest or 1)

    centre = [(row["step"], row["density"]["m"]) for row in train if "m" in row.get("density", {})]
    loss, r = _running_mean(logged("loss_fm")), logged("r") * r_is_used(train)
    n, last = preview_clips(config, evals), evals[-1]["eval"] if evals else {}
    wanted = [
        ("Flow-matching loss", "squared velocity error", None,
         [Series("training, t from p(t)", loss),
          Series("validation, averaged network, uniform t", evaluated("val_loss"), "points", 1)], None),
        ("Discrepancy D", "1 - cosine", None, [Series("D, whose slope gives r", logged("D"), "points")], "D"),
        ("Regime r", "0 acquires, 1 refines", (0, 1.02), [Series("r", r, "steps")], "r"),
        ("Weight of guidance, lambda", "loss weight", from_zero("lambda"),
         [Series("lambda", logged("lambda"), "steps")], "lambda"),
        ("Centre of p(t), m", "logit", None, [Series("m", centre, "steps")], "m"),
        ("Weight of the structure loss, mu", "loss weight", from_zero("mu"),
         [Series("mu", logged("mu"), "steps")], None),
    ]
    for key, title, unit in AXES[config["task"]]:
        clips = last.get("texture_measured_on", min(n, SAMPLED_TWICE)) if key == "texture_score" else n
        label = f"{clips} validation clips, {QUICK_STEPS} integration steps"
        wanted.append((title, unit, None, [Series(label, evaluated(key), "points")], None))
    panels, missing = [], []
    for title, unit, limits, series, of_band in wanted:
        drawn = make_panel(title, unit, series, axis, limits, band.get(of_band))
        if drawn:
            panels.append(drawn)
        else:
            missing.append(title.partition(":")[0])
    return panels, f"Not measured in this run: {', '.join(missing)}." if missing else ""


def _running_mean(points: list[tuple], n: int = 5) -> list[tuple]:
    """Mean of up to n points that end at each."""
    values = [value for _, value in points]
    return [(step, float(np.mean(values[max(0, k - n + 1) : k + 1]))) for k, (step, _) in enumerate(points)]


def densities(steps: list[int], train: list[dict], logit_normal) -> dict | None:
    """p(t) at each position of the slider, as paths."""
    t = (torch.arange(60) + 0.5) / 60
    if not train:
        return None
    first = train[0]["density"]
    fields = [last_value(train, step, "density") or first for step in steps]
    values = []
    for of in (first, *fields):
        density = Binned(**of) if "shares" in of else logit_normal(**of)
        values.append(density.pdf(t).numpy())
    highest = 1.05 * max(float(p.max()) for p in values)
    width = curves.WIDTH - curves.LEFT - curves.RIGHT
    height = curves.HEIGHT - curves.TOP - curves.BOTTOM

    def x(share: float) -> float:
        return round(curves.LEFT + width * float(share), 1)

    def y(p: float) -> float:
        return round(curves.HEIGHT - curves.BOTTOM - height * float(p) / highest, 1)

    paths = [curves.line([(x(a), y(p)) for a, p in zip(t, of)]) for of in values]
    frame = curves.Panel("p(t)", "density", [(x(a), f"{a:g}") for a in (0, 0.25, 0.5, 0.75, 1)],
                         [(y(value), label) for value, label in curves.nice_ticks(0, highest, 4)],
                         x_label="t (1 is pure noise)")
    return {"frame": frame, "first": paths[0], "paths": spans(paths[1:])}


# --- similarity of the blocks -------------------------------------------------------------------------------

def similarity_at(step: int, train: list[dict]) -> dict | None:
    """The last check of the blocks up to a step: matrix S with its blocks ordered by group; None before."""
    rows = [row for row in train if "structure" in row and row["step"] <= step]
    if not rows:
        return None
    check = rows[-1]["structure"]
    groups = np.array(check["groups"])
    order = np.argsort(groups, kind="stable")
    S = np.array(check["S"])[np.ix_(order, order)]
    L = len(S)
    side = curves.HEIGHT - 2 * curves.TOP
    size, left, top = side / L, (curves.WIDTH - side) / 2, 8
    different = np.abs(S[~np.eye(L, dtype=bool)]).max(initial=0.05)
    cells = []
    for i in range(L):
        for j in range(L):
            share = 1.0 if i == j else abs(S[i, j]) / different
            grey = 255 if i == j else int(255 - 190 * min(1.0, share))
            text = f"{S[i, j]:.2f}".replace("0.", ".") if i != j and L <= 8 else ""
            cells.append({"x": round(left + j * size, 1), "y": round(top + i * size, 1), "grey": grey,
                          "text": text, "ink": "#fff" if grey < 140 else "#1b1b1b"})
    labels = []
    for k, block in enumerate(order + 1):
        middle = (k + 0.5) * size
        labels.append({"x": round(left - 6, 1), "y": round(top + middle + 3.5, 1), "anchor": "end",
                       "text": str(block)})
        labels.append({"x": round(left + middle, 1), "y": round(top + side + 13, 1), "anchor": "middle",
                       "text": str(block)})
    edges = []
    for k in np.flatnonzero(np.diff(groups[order])) + 1:
        at = round(k * size, 1)
        edges.append(f"M{left:g} {top + at:g}h{side:g}M{left + at:g} {top:g}v{side:g}")
    text = (f"Checked at step {rows[-1]['step']:,}: blocks by number, ordered by group, thick lines between "
            f"groups; darker is larger, of either sign. p = {check['p']:.3f} against random weights, "
            f"{check['p_depth']:.3f} against depth alone; {check['streak']} checks in a row passed.")
    return {"cells": cells, "labels": labels, "edges": edges, "size": round(size, 2), "text": text}


# --- is it normal? ------------------------------------------------------------------------------------------

def compare_with_band(config: dict, train: list[dict]) -> tuple[dict, str]:
    """The band of default runs to draw behind this run's curves, {name: (steps, lowest, highest)}, and what
    is to be said of the run. No band where another task, other data or another preset is trained."""
    recorded = json.loads(BANDS.read_text(encoding="utf-8")) if BANDS.is_file() else {}
    comparable = config["data"] == "soundworld" and config["preset"] == "smoke"
    if config["task"] not in recorded or not comparable:
        return {}, "There are recorded runs of the preset `smoke` on soundworld only, so no band is drawn."
    found = recorded[config["task"]]
    band = {name: (found["steps"], *found[name]) for name in ("D", "r", "lambda", "m")}
    counts = []
    for name in ("D", "r"):
        rows = [row for row in train if row.get(name) is not None and row["step"] in found["steps"]]
        inside = 0
        for row in rows:
            k = found["steps"].index(row["step"])
            inside += found[name][0][k] - 1e-6 <= row[name] <= found[name][1][k] + 1e-6
        if rows:
            counts.append(f"{name} lies inside at {inside} of {len(rows)} probes")
    said = ("The grey bands are where a further default run lies with 95 % probability at each probe, from "
            f"{found['runs']} seeds of {found['setting']['steps']:,} steps (docs/normal.md). ")
    said += f"In this run {' and '.join(counts)}. " if counts else "This run measured neither D nor r. "
    others = [name for name, _, _ in settings_not_default(config) if name not in NOT_OF_TRAINING]
    if others:
        said += (f"But it is not a default run ({', '.join(others)}): the bands show where a default one "
                 "would be, not where this one should be.")
    return band, said
