"""Run folders of tests: made, read back, compared.

Public: a_run, save, final, log_of, step_rows, same_weights, distance, until, clips_of_step.
"""
import json
import time

import numpy as np
import torch

from parts.checkpoints import TRAINED, USED, load_checkpoint, save_checkpoint
from parts.config import Config, load_config, save_config
from parts.soundworld import SoundWorld


def a_run(folder, **settings):
    """A folder with settings and nothing else; returns it."""
    folder.mkdir()
    save_config(folder, Config(device="cpu", **settings))
    return folder


def save(folder, step=1, **state) -> None:
    """A checkpoint of the run in `folder`."""
    parts = {name: kind() for name, kind in {**USED, **TRAINED}.items()}           # empty ones
    saved = {**parts, "step": step, "config": load_config(folder), **state}
    save_checkpoint(folder / "checkpoint.pt", **saved)


def final(path) -> dict:
    """The newest checkpoint of a run."""
    return load_checkpoint(path)[1]


def log_of(path) -> list[dict]:
    """All lines of its log."""
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def step_rows(path) -> list[dict]:
    """The lines about training steps, without those about evaluations."""
    return [row for row in log_of(path) if "loss" in row]


def same_weights(a: dict, b: dict) -> bool:
    """Are network and average of two checkpoints equal in every bit?"""
    return all(torch.equal(a[part][name], b[part][name]) for part in ("model", "ema") for name in a[part])


def distance(a: dict, b: dict) -> float:
    """Relative distance of two sets of weights. (Of all of them: AdamW divides by the gradient's size, so a
    weight whose gradient is rounding noise moves by its learning rate in either direction.)"""
    apart = sum((a[name] - b[name]).square().sum() for name in a)
    size = sum(b[name].square().sum() for name in b)
    return float(apart ** 0.5 / size ** 0.5)


def until(condition, seconds=120) -> None:
    """Wait until condition() holds; TimeoutError after so many seconds."""
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def clips_of_step(k: int) -> set[int]:
    """Which of 100 training clips step k of seed 0 draws, eight by their events."""
    p = SoundWorld("train", 100).p_by_events()
    return set(np.random.default_rng([0, 1, k]).choice(100, 8, p=p).tolist())
