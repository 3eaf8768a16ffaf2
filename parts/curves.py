"""Curves over training as inline SVG: small panels that share one axis of steps, so that one cursor fits all.

Steps are on a logarithmic axis (a doubling of the step is the same distance everywhere). A curve is told from
its neighbours by its dash, and points by their marker, so a panel reads without colour. The macro `panel` of
parts/templates/curves.html.j2 draws what `make_panel` returns.

Coordinates are pixels of a box of WIDTH x HEIGHT, y downwards. Points are (step, value), steps ascending.

Public: WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, StepAxis, Series, Panel, make_panel, line, nice_ticks.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 18, 40          # margins around what is drawn
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2 1 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond")
MOST_POINTS = 160                                  # of a curve; what is more is thinned


class StepAxis:
    """The horizontal axis, from step `first` to step `last`."""

    def __init__(self, last: int):
        self.first = 10 if last > 20 else 1
        self.last = max(last, 2 * self.first)

    def share(self, step: float) -> float:
        """Where a step lies: 0 at the first, 1 at the last."""
        return float(np.log(step / self.first) / np.log(self.last / self.first))

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * self.share(step), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(x, label): powers of two, at most six of them."""
        powers = [2**k for k in range(31) if self.first <= 2**k <= self.last]
        every = -(-len(powers) // 6)
        return [(self.x(step), f"{step:,}") for step in powers[::every]]


@dataclass
class Series:
    """One curve. how: "line" | "steps" (a value holds until the next) | "points" (a line with markers)."""
    label: str
    points: list[tuple[float, float]]
    how: str = "line"
    style: int = 0                                 # its colour, dash and marker


@dataclass
class Panel:
    """What the template draws."""
    title: str
    unit: str
    x_ticks: list
    y_ticks: list
    curves: list[dict] = field(default_factory=list)
    band: str = ""                                 # a path, or nothing
    x_label: str = "training step (logarithmic)"


def make_panel(title: str, unit: str, series: list[Series], axis: StepAxis, limits=None,
               band: tuple[list, list, list] | None = None) -> Panel | None:
    """A panel, or None where no series has a point on the axis. limits: (lowest, highest) value or None.
    band: (steps, lowest, highest), drawn in grey behind the curves."""
    shown = []
    for one in series:
        points = [(step, value) for step, value in one.points if axis.first <= step <= axis.last]
        if points:
            shown.append(Series(one.label, _thinned(points, axis, one.how), one.how, one.style))
    if not shown:
        return None
    values = [value for one in shown for _, value in one.points]
    inside = [k for k, step in enumerate(band[0]) if axis.first <= step <= axis.last] if band else []
    values += [ends[k] for ends in band[1:] for k in inside] if band else []
    lowest, highest = limits or _around(values)
    ticks = nice_ticks(lowest, highest)

    def y(value: float) -> float:
        share = (np.clip(value, lowest, highest) - lowest) / (highest - lowest)
        return round(float(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share), 1)

    panel = Panel(title, unit, axis.ticks(), [(y(value), label) for value, label in ticks])
    for one in shown:
        at = [(axis.x(step), y(value)) for step, value in one.points]
        panel.curves.append({
            "label": one.label,
            "d": line(at, one.how == "steps"),
            "style": one.style,
            "dash": DASHES[one.style % len(DASHES)],
            "marker": MARKERS[one.style % len(MARKERS)] if one.how == "points" else "",
            "at": at if one.how == "points" else [],
            "n": len(one.points),
        })
    if len(inside) > 1:
        x = [axis.x(band[0][k]) for k in inside]
        lower, upper = ([y(ends[k]) for k in inside] for ends in band[1:])
        panel.band = polygon([*zip(x, lower), *reversed(list(zip(x, upper)))])
    return panel


def _around(values: list[float]) -> tuple[float, float]:
    """Limits a little outside of all values."""
    lowest, highest = min(values), max(values)
    room = 0.06 * (highest - lowest) or 0.05 * abs(highest) or 0.5
    return lowest - room if lowest < 0 else max(0, lowest - room), highest + room


def _thinned(points: list[tuple], axis: StepAxis, how: str) -> list[tuple]:
    """At most MOST_POINTS points: of each part of the axis the mean, of "steps" the last."""
    if len(points) <= MOST_POINTS:
        return points
    parts: dict[int, list] = {}
    for step, value in points:
        parts.setdefault(int(axis.share(step) * (MOST_POINTS - 1)), []).append((step, value))
    if how == "steps":
        return [part[-1] for part in parts.values()]
    return [tuple(np.mean(part, 0)) for part in parts.values()]


def nice_ticks(lowest: float, highest: float, most: int = 5) -> list[tuple[float, str]]:
    """(value, label): multiples of 1, 2 or 5 times a power of ten within the limits."""
    rough = (highest - lowest) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * (1 - 1e-9))
    digits = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    first, last = int(np.ceil(lowest / step - 1e-9)), int(np.floor(highest / step + 1e-9))
    return [(k * step, f"{k * step:.{digits}f}") for k in range(first, last + 1)]


def line(at: list[tuple[float, float]], steps: bool = False) -> str:
    """The path through points; steps: each holds until the next."""
    (x, y), *others = at
    path = [f"M{x:g} {y:g}"]
    for x, y in others:
        path.append(f"H{x:g}V{y:g}" if steps else f"L{x:g} {y:g}")
    return "".join(path)


def polygon(at: list[tuple[float, float]]) -> str:
    return line(at) + "Z"
