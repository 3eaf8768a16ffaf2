"""Claims about the dashboard: it is drawn from the files of a run alone."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from fabricated import pairs

from parts.config import Config
from parts.dashboard import draw_dashboard
from parts.errors import UserError
from parts.spectrograms import draw_previews

CONFIG = dataclasses.asdict(Config(device="cpu", steps=20, score_clips=8))


class Flat:
    """A density of timesteps that is 1 everywhere; `asked`: the fields that it was made with."""
    asked = []

    def __init__(self, **fields):
        self.asked.append(fields)

    def pdf(self, t):
        return torch.ones_like(t)


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.setattr(Flat, "asked", [])


def write_log(path, rows, **config):
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "samples").mkdir(exist_ok=True)


def step_row(step, **more):
    return {"step": step, "loss": 1.0 / step, "loss_fm": 1.0 / step, **DRIVEN, **more}


def eval_row(step, **metrics):
    return {"step": step, "eval": {"val_loss": 1.0, "val_loss_t": [1.0] * 10, **metrics}}


STRUCTURE = {"S": np.eye(4).tolist(), "groups": [0, 1, 0, 1], "p": 0.5, "p_depth": 0.4,
             "rand_index": 0.0, "streak": 1}
DENSITY = {"m": 1.5, "s": 1.2, "u": 0.1}
DRIVEN = {"r": 0.5, "lambda": 0.5, "mu": 0.1, "density": DENSITY}


def test_a_dashboard_is_drawn_from_a_log_and_the_last_previews(tmp_path):
    """Each logged density of timesteps is asked of the caller, by its centre, width and floor."""
    measured = {"D": 0.9, "D_of": {"t1.0": 0.9, "t0.5": 0.3, "t0.5-pooled": 0.2, "sample": 0.5},
                "agreement": 0.1, "struct_share": 0.05}
    rows = [step_row(k, **measured, structure=STRUCTURE, no_signal=1) for k in (1, 2, 4, 8)]
    not_finite = {"val_loss": None, "val_loss_t": [None] * 10, "event_accuracy": 0.4, "order_n": 0}
    rows += [eval_row(4, **not_finite), eval_row(8, event_accuracy=0.5, recall=0.5, order=None, order_n=0)]
    write_log(tmp_path, rows)
    draw_previews(tmp_path, 8, pairs())
    draw_dashboard(tmp_path, Flat)
    assert (tmp_path / "dashboard.png").stat().st_size > 10_000
    assert Flat.asked == [DENSITY] * 4
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_binned_density_is_drawn_as_it_is(tmp_path):
    """A peer's density is known here; nothing is asked of the caller about it. Negative control: of
    logit-normal ones, each is."""
    binned = {**DRIVEN, "density": {"shares": [0.25, 0.75], "u": 0.1}}
    for rows, asked in (([DRIVEN, binned, binned], [DENSITY]), ([DRIVEN] * 3, [DENSITY] * 3)):
        Flat.asked.clear()
        write_log(tmp_path, [step_row(k, **row) for k, row in enumerate(rows, 1)], recipe="infonoise")
        draw_dashboard(tmp_path, Flat)
        assert (tmp_path / "dashboard.png").is_file() and Flat.asked == asked


@pytest.mark.parametrize("rows", [
    [],
    [step_row(1), step_row(2)],
])
def test_a_dashboard_of_a_run_that_logged_little_is_drawn_too(tmp_path, rows):
    """No step yet; steps without discrepancy, block structure, evaluation."""
    write_log(tmp_path, rows, task="sr")
    draw_dashboard(tmp_path, Flat)
    assert (tmp_path / "dashboard.png").is_file()


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="no log.jsonl"):
        draw_dashboard(tmp_path, Flat)
