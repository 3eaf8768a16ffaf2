"""Claims about the moments of a run: the same clips and noise each time, and nothing changes in training."""
import signal
import types

import numpy as np
import pytest
from run_files import final, same_weights

import train
from parts.band_limit import band_limit
from parts.errors import Stopped
from parts.moments import moment_due, read_moments, write_moment
from parts.soundworld import SoundWorld


def run_of(path, task="t2a"):
    return types.SimpleNamespace(path=path, config={"task": task, "seconds": 1.0})


def noise(inputs, seeds):
    """A network that makes noise."""
    return np.stack([0.1 * np.random.default_rng(seed).standard_normal(17_000) for seed in seeds])


def test_moments_are_due_at_each_doubling_from_16_on_and_at_the_end():
    due = [k for k in range(1, 3_001) if moment_due(k, 3_000)]
    assert due == [16, 32, 64, 128, 256, 512, 1_024, 2_048, 3_000]
    assert [k for k in range(1, 13) if moment_due(k, 12)] == [12]


def test_every_moment_is_made_of_the_same_captions_and_seeds(tmp_path):
    """They are looked up once: a validation set that is gone later is not missed."""
    asked = []

    def make(inputs, seeds):
        asked.append((inputs, seeds))
        return noise(inputs, seeds)

    run, world = run_of(tmp_path), SoundWorld("val", 6)
    write_moment(run, 16, world, make)
    write_moment(run, 32, None, make)
    assert asked[0] == asked[1] and asked[0][1] == [0, 1, 2, 3]
    found = read_moments(tmp_path, 32)
    assert found.captions == asked[0][0] == [world.caption(i) for i in range(4)]
    assert list(found.made) == [16, 32] and list(found.references) == ["real"] and found.seconds > 0
    real = world.wave(1)[:16_000]
    assert np.abs(found.references["real"][1] - real).max() < 1e-4
    assert np.abs(found.made[32][2] - noise([], [2])[0][:16_000]).max() < 1e-4, "no longer than the clip"


def test_super_resolution_is_given_the_band_limited_clip(tmp_path):
    given = []

    def make(inputs, seeds):
        given.append(inputs)
        return inputs

    world = SoundWorld("val", 4)
    write_moment(run_of(tmp_path, "sr"), 16, world, make)
    found = read_moments(tmp_path, 16)
    assert list(found.references) == ["input", "real"]
    assert np.abs(given[0][3] - band_limit(world.wave(3)[:16_000], 2_000)).max() < 1e-4
    assert np.abs(found.made[16][3] - given[0][3]).max() < 1e-4


def test_half_a_moment_and_one_past_the_end_are_left_out(tmp_path):
    """Of a run that died while it wrote one, or after its last checkpoint."""
    run, world = run_of(tmp_path), SoundWorld("val", 4)
    assert read_moments(tmp_path, 99).made == {}, "negative control: none yet"
    for step in (16, 32, 64):
        write_moment(run, step, world, noise)
    (tmp_path / "moments" / "step000016.json").unlink()
    assert list(read_moments(tmp_path, 63).made) == [32]
    assert list(read_moments(tmp_path, 64).made) == [32, 64]


def test_training_with_moments_stopped_and_resumed_is_bitwise_training_without(
        tiny, tmp_path, bare, monkeypatch):
    """Stopped right after step 16, continued to 18: the weights of a run without moments; a moment each."""
    settings = {**tiny, "task": "t2a", "steps": 18, "eval_every": 18}
    plain = train.train({**settings, "out": str(tmp_path / "plain")})
    assert not (plain / "moments").exists()

    def write_and_stop(run, step, *more):
        write_moment(run, step, *more)
        signal.raise_signal(signal.SIGTERM)

    out = tmp_path / "moments"
    monkeypatch.setattr(train, "write_moment", write_and_stop)
    with pytest.raises(Stopped):
        train.train({**settings, "out": str(out)})
    assert list(read_moments(out, 18).made) == [16]
    monkeypatch.setattr(train, "write_moment", write_moment)
    train.train({}, str(out))
    assert list(read_moments(out, 18).made) == [16, 18]
    assert same_weights(final(plain), final(out))
