"""Claims about the figures of a run's page: each position of the slider shows what was logged up to it."""
import dataclasses
import json
import re

import numpy as np
import pytest

from parts import page_figures
from parts.config import Config, resolve
from parts.curves import BOTTOM, HEIGHT, StepAxis
from parts.dashboard import why_no_similarity
from parts.page_figures import (
    BANDS,
    Span,
    compare_with_band,
    densities,
    last_value,
    panels_of,
    similarity_at,
    spans,
)


def config(**given) -> dict:
    return dataclasses.asdict(resolve({"device": "cpu", "out": "x", **given}))


class Triangle:
    """A density of timesteps: p(t) = 2 t, or its mirror image."""

    def __init__(self, m):
        self.m = m

    def pdf(self, t):
        return 2 * t if self.m > 0 else 2 * (1 - t)


def row(step, **more):
    return {"step": step, "loss": 1.0, "loss_fm": 1.0, "r": 0.5, "lambda": 0.25, "mu": 0.0, **more}


def test_equal_neighbours_are_shown_as_one_and_nothing_at_all_as_none():
    assert spans([None, "a", "a", "b"]) == [Span(0, 0, None), Span(1, 2, "a"), Span(3, 3, "b")]
    assert spans([None, None], skip_none=True) == [] != spans([None, None])


def test_the_last_value_up_to_a_step_is_found_and_none_before():
    rows = [row(10), row(20, D=0.5), row(30), row(40, D=0.3)]
    assert [last_value(rows, step, "D") for step in (10, 20, 39, 40, 99)] == [None, 0.5, 0.5, 0.3, 0.3]


def test_every_logged_number_has_its_panel_and_what_is_not_measured_is_said():
    train = [row(step, density={"m": 1.5}) for step in range(10, 110, 10)] + [row(128, D=0.4)]
    evals = [{"step": 64, "eval": {"val_loss": 1.0, "event_accuracy": 0.5}}]
    panels, missing = panels_of(config(), train, evals, StepAxis(128), {})
    titles = [panel.title for panel in panels]
    assert len(titles) == 7 and titles[-1].startswith("Semantic axis") and missing == (
        "Not measured in this run: Fidelity axis.")
    points = {curve["label"]: curve["n"] for panel in panels for curve in panel.curves}
    assert points["training, t from p(t)"] == points["r"] == 11 and points["m"] == 10
    assert points["validation, averaged network, uniform t"] == points["D, whose slope gives r"] == 1
    assert not any(panel.band for panel in panels)


def test_the_density_of_each_moment_is_drawn_and_equal_ones_once():
    train = [row(10, density={"m": 1}), row(40, density={"m": -1})]
    drawn = densities([16, 32, 64], train, Triangle)
    assert [(path.first, path.until) for path in drawn["paths"]] == [(0, 1), (2, 2)]
    rising, falling = ([float(y) for y in re.findall(r" ([\d.]+)", path.value)] for path in drawn["paths"])
    assert drawn["first"] == drawn["paths"][0].value and rising == falling[::-1]
    base, highest = HEIGHT - BOTTOM, min(rising)
    halfway = next(y for y, t in zip(rising, (np.arange(60) + 0.5) / 60) if t > 0.5)
    assert abs((base - halfway) / (base - highest) - 0.5) < 0.02, "p is drawn to scale"
    assert densities([16], [], Triangle) is None


def test_the_blocks_are_shown_by_group_from_their_first_check_on():
    S = np.eye(4) + 0.4 * (np.eye(4)[[2, 3, 0, 1]])          # 1 goes with 3, 2 with 4
    check = {"S": S.tolist(), "groups": [0, 1, 0, 1], "p": 0.01, "p_depth": 0.2, "streak": 2}
    train = [row(32), row(64, structure=check)]
    assert similarity_at(63, train) is None
    drawn = similarity_at(64, train)
    assert [label["text"] for label in drawn["labels"][::2]] == ["1", "3", "2", "4"]
    dark = [k for k, cell in enumerate(drawn["cells"]) if cell["text"] == ".40"]
    assert dark == [1, 4, 11, 14] and len(drawn["edges"]) == 1 and "step 64" in drawn["text"]
    assert "--structure is off" in why_no_similarity(config(structure="off"))
    assert "4 blocks" in why_no_similarity(config())
    assert "step 32" in why_no_similarity(config(depth=8)), "stopped before it"


@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_a_run_in_the_middle_of_the_band_is_normal_and_one_outside_is_not(task):
    found = json.loads(BANDS.read_text())[task]
    middle = {name: np.mean(found[name], 0) for name in ("D", "r")}
    train = [row(step, D=middle["D"][k], r=middle["r"][k]) for k, step in enumerate(found["steps"])]
    band, said = compare_with_band(config(task=task), train)
    n = len(train)
    assert set(band) == {"D", "r", "lambda", "m"} and len(band["D"][0]) == n > 20
    assert f"D lies inside at {n} of {n} probes and r lies inside at {n} of {n} probes" in said
    assert "not a default run" not in said
    outside = [{**line, "D": line["D"] + 2} for line in train]
    assert f"D lies inside at 0 of {n}" in compare_with_band(config(task=task), outside)[1]
    assert "not a default run (lr)" in compare_with_band(config(task=task, lr=1e-3), train)[1]
    assert compare_with_band(config(task=task, data="folder"), train)[0] == {}


def test_the_band_is_of_runs_with_todays_defaults():
    assert set(json.loads(BANDS.read_text())) == {"t2a", "sr"}
    for task, found in json.loads(BANDS.read_text()).items():
        now = config(task=task)
        assert {name: now[name] for name in found["setting"]} == found["setting"]
        assert found["runs"] == {"t2a": 4, "sr": 5}[task]
        assert all(low <= high for name in ("D", "r", "lambda", "m") for low, high in zip(*found[name]))


def test_without_a_recorded_band_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(page_figures, "BANDS", tmp_path / "none.json")
    assert compare_with_band(dataclasses.asdict(Config(preset="smoke")), [])[0] == {}
