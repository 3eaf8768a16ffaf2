"""Claims about curves as SVG: where points come to lie, and that none is lost without being meant to."""
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parts.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, StepAxis, make_panel, nice_ticks


def numbers(path: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?[\d.]+", path)]


def test_a_doubling_is_the_same_distance_everywhere():
    axis = StepAxis(3_000)
    distances = np.diff([axis.x(16 * 2**k) for k in range(8)])
    assert np.ptp(distances) < 0.15 and axis.x(10) == LEFT and axis.x(3_000) == WIDTH - RIGHT
    assert [label for _, label in axis.ticks()] == ["16", "64", "256", "1,024"]


@pytest.mark.parametrize("last", [1, 2, 12, 20, 21, 300_000])
def test_an_axis_of_any_length_has_two_ends_and_few_ticks(last):
    axis = StepAxis(last)
    assert axis.x(axis.first) == LEFT and axis.x(axis.last) == WIDTH - RIGHT
    assert 1 <= len(axis.ticks()) <= 6


def test_points_lie_where_their_values_are_and_steps_hold():
    axis = StepAxis(64)
    panel = make_panel("r", "", [Series("r", [(16, 0.0), (32, 0.5), (64, 1.0)], "steps")], axis, (0, 1))
    low, middle, high = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2, TOP
    expected = [axis.x(16), low, axis.x(32), middle, axis.x(64), high]
    assert numbers(panel.curves[0]["d"]) == expected and "H" in panel.curves[0]["d"]
    line = make_panel("r", "", [Series("r", [(16, 0.0), (64, 1.0)], "points")], axis, (0, 1)).curves[0]
    assert line["at"] == [(axis.x(16), low), (axis.x(64), high)] and line["marker"] and "L" in line["d"]


def test_curves_differ_in_dash_and_points_in_marker():
    series = [Series(str(k), [(16, k), (32, k)], "points", k) for k in range(4)]
    curves = make_panel("x", "", series, StepAxis(64)).curves
    assert len({curve["dash"] for curve in curves}) == len({curve["marker"] for curve in curves}) == 4


def test_a_curve_keeps_its_colour_where_another_has_no_points_and_a_constant_share_its_zero():
    axis = StepAxis(64)
    (curve,) = make_panel("x", "", [Series("a", []), Series("b", [(16, 1)], style=1)], axis).curves
    assert curve["style"] == 1
    low = make_panel("x", "", [Series("a", [(16, 0.0), (32, 0.0)])], axis)
    assert not any(label.startswith("-") for _, label in low.y_ticks)
    assert any(label.startswith("-") for _, label in
               make_panel("x", "", [Series("a", [(16, -1.0), (32, 0.0)])], axis).y_ticks)


def test_a_long_curve_is_thinned_evenly_and_a_short_one_is_kept():
    """A mean in each part of the axis; of a value that holds, the last."""
    axis = StepAxis(3_000)
    points = [(step, float(step)) for step in range(10, 3_001)]
    for how, last in (("steps", TOP), ("line", None)):
        curve = make_panel("x", "", [Series("x", points, how)], axis, (0, 3_000)).curves[0]
        assert 100 < curve["n"] <= 160
        if last is not None:
            assert numbers(curve["d"])[-1] == last
    assert make_panel("x", "", [Series("x", points[:50])], axis).curves[0]["n"] == 50


def test_nothing_to_draw_is_no_panel_and_a_band_is_a_closed_area():
    axis = StepAxis(64)
    assert make_panel("x", "", [Series("x", [])], axis) is None
    band = ([8, 16, 32, 128], [9, 0, 1, 9], [9, 2, 3, 9])
    panel = make_panel("x", "", [Series("x", [(16, 1)])], axis, (0, 4), band)
    assert panel.band.endswith("Z") and len(numbers(panel.band)) == 2 * 4, "two probes are on the axis"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_within_the_limits_and_told_apart(low, width):
    ticks = nice_ticks(low, low + width)
    assert len(ticks) <= 7
    assert all(low - 1e-6 * width <= value <= low + width * (1 + 1e-6) for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
