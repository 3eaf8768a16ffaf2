"""Claims about the pictures of a run: they are drawn from its files alone."""
import json

import numpy as np
import pytest
import scipy.io.wavfile
import torch

from parts import pictures
from parts.audio import RATE
from parts.errors import UserError

CONFIG = dict(task="t2a", data="soundworld", steps=20, seed=0, recipe="stage", t_std=1.0, score_clips=8)


def flat(t, m, s):
    return torch.ones_like(t)


def pairs(n=2):
    rng = np.random.default_rng(0)
    clips = 0.1 * rng.standard_normal((n, 2, RATE)).astype(np.float32)
    return [(f"$caption {k}: rain, then wind_", real, made) for k, (real, made) in enumerate(clips)]


def write_log(path, rows, **config):
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "samples").mkdir(exist_ok=True)


def step_row(step, **more):
    return {"step": step, "loss": 1.0 / step, "loss_fm": 1.0 / step, **more}


def eval_row(step, **metrics):
    return {"step": step, "eval": {"val_loss": 1.0, "val_loss_t": [1.0] * 10, **metrics}}


STRUCTURE = {"S": np.eye(4).tolist(), "groups": [0, 1, 0, 1], "p": 0.5, "rand_index": 0.0, "streak": 1}
DRIVEN = {"r": 0.5, "lambda": 0.5, "mu": 0.1, "m": 1.5}


def test_previews_are_a_picture_sounds_and_captions(tmp_path):
    (tmp_path / "samples").mkdir()
    pictures.draw_previews(tmp_path, 7, pairs())
    names = {file.name for file in (tmp_path / "samples").iterdir()}
    sounds = {"real-0.wav", "real-1.wav", "step000007-0.wav", "step000007-1.wav"}
    assert names == sounds | {"step000007.png", "captions.txt"}
    rate, made = scipy.io.wavfile.read(tmp_path / "samples" / "step000007-1.wav")
    assert rate == RATE and np.abs(made / 32_767 - pairs()[1][2]).max() < 1e-4
    captions = (tmp_path / "samples" / "captions.txt").read_text()
    assert captions == "0: $caption 0: rain, then wind_\n1: $caption 1: rain, then wind_\n"


def test_a_dashboard_is_drawn_from_a_log_and_the_last_previews(tmp_path):
    """The density of each logged location m is asked of the caller, with the run's width."""
    asked = []

    def density(t, m, s):
        asked.append((len(t), m, s))
        return torch.ones_like(t)

    measured = {"D": 0.9, "D_t": {"1.0": 0.9, "0.5": 0.3}, "D_shuffled": 0.9, "agreement": 0.1}
    rows = [step_row(k, **DRIVEN, **measured, structure=STRUCTURE, no_signal=1) for k in (1, 2, 4, 8)]
    rows.append(eval_row(8, event_accuracy=0.5, recall=0.5, order=None, order_n=0))
    write_log(tmp_path, rows)
    pictures.draw_previews(tmp_path, 8, pairs())
    pictures.dashboard(tmp_path, density)
    assert (tmp_path / "dashboard.png").stat().st_size > 10_000
    assert asked == [(100, 1.5, 1.0)] * 4
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("rows", [
    [],
    [step_row(1), step_row(2)],
    [step_row(1, **DRIVEN), step_row(2, **DRIVEN)],
])
def test_a_dashboard_of_a_run_that_logged_little_is_drawn_too(tmp_path, rows):
    """No step yet; no regime; a regime and no discrepancy, block structure, evaluation."""
    write_log(tmp_path, rows, task="sr")
    pictures.dashboard(tmp_path, flat)
    assert (tmp_path / "dashboard.png").is_file()


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="no log.jsonl"):
        pictures.dashboard(tmp_path, flat)


def test_a_full_scale_sine_is_at_0_db():
    import matplotlib.pyplot as plt

    x = np.sin(2 * np.pi * 1_000 * np.arange(RATE) / RATE).astype(np.float32)
    fig, ax = plt.subplots()
    db = pictures.draw_spectrogram(ax, x, "a sine").get_array()    # (513, frames)
    assert abs(db.max()) < 0.1 and set(db[:, 3:-3].argmax(0)) == {64}
    plt.close(fig)
