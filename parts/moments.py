"""Moments of a run: what the averaged network makes of the same four clips, from the same noise, at each
doubling of the step. On the run's page (parts/page.py) they are the positions of a slider.

    moments/clips.json          captions, and which references there are
    moments/real-K.wav          the K-th clip itself; input-K.wav: its band-limited version (super-resolution)
    moments/step000016-K.wav    what the network made at step 16; 16-bit, 16 kHz
    moments/step000016.json     {"step", "seconds"}: how long it took; written last, so a moment is whole or
                                absent

They are cheap, made in few integration steps: each of the ten moments of the default run takes about as
long as one of its 6,000 training steps; the run's page says what its own took. Each sound has a generator of
its own, so training is bitwise what it would be without them; a resumed run writes a moment again only if it
comes past it again.

Waves are (N,) or (n, N) float32 in [-1, 1] at 16 kHz.

Public: FIRST, MOMENT_STEPS, moment_due, write_moment, Moments, read_moments.
"""
from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts.audio import read_wav, write_wav
from parts.files import reading, to_json, write_text
from parts.previews import shown_clips

FIRST = 16        # step of the first moment
MOMENT_STEPS = 8  # integration steps of its sounds
FOLDER = "moments"


def moment_due(k: int, last: int) -> bool:
    """At steps 16, 32, 64 ... and at the last one."""
    is_power_of_two = k & (k - 1) == 0
    return k == last or (k >= FIRST and is_power_of_two)


def write_moment(run, step: int, val_set, make) -> None:
    """Write the moment of a step into a run folder. run: of which `path` and `config` are read; make(inputs,
    seeds) -> waves (n, N), where inputs are captions, or band-limited waves (n, N) in super-resolution."""
    began, folder = time.perf_counter(), run.path / FOLDER
    if not (folder / "clips.json").is_file():
        _write_clips(folder, run.config, val_set)
    captions, references = _read_clips(folder)
    real = references["real"]
    inputs = np.stack(references["input"]) if "input" in references else captions
    made = make(inputs, list(range(len(real))))
    _write_waves(folder, f"step{step:06d}", made[:, : len(real[0])])
    seconds = round(time.perf_counter() - began, 4)
    write_text(folder / f"step{step:06d}.json", to_json({"step": step, "seconds": seconds}) + "\n")


def _write_clips(folder: Path, config: dict, val_set) -> None:
    captions, real, inputs = shown_clips(val_set, config)
    references = {"input": inputs, "real": real} if config["task"] == "sr" else {"real": real}
    for name, waves in references.items():
        _write_waves(folder, name, waves)
    clips = {"captions": captions, "references": list(references)}
    write_text(folder / "clips.json", to_json(clips, indent=1) + "\n")


def _read_clips(folder: Path) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Captions, and the waves of each reference."""
    with reading(folder / "clips.json", f"delete {folder}: the page then goes without sounds"):
        clips = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
        n = len(clips["captions"])
        return clips["captions"], {name: _read_waves(folder, name, n) for name in clips["references"]}


def _write_waves(folder: Path, name: str, waves: np.ndarray) -> None:
    for k, wave in enumerate(waves):
        write_wav(folder / f"{name}-{k}.wav", wave)


@dataclass
class Moments:
    """The moments of a run folder, in the order of their steps."""
    captions: list[str]
    references: dict[str, list[np.ndarray]]  # "input" (super-resolution), "real" -> a wave of each caption
    made: dict[int, list[np.ndarray]]        # step -> a wave of each caption
    seconds: float                           # that all of them took


def read_moments(path: Path, last: int) -> Moments:
    """Moments of a run folder up to step `last`: later ones are of a run that died after its checkpoint, and
    will be written again. A run without any has none."""
    folder = path / FOLDER
    if not (folder / "clips.json").is_file():
        return Moments([], {}, {}, 0.0)
    captions, references = _read_clips(folder)
    made, seconds = {}, 0.0
    for file in sorted(folder.glob("step*.json")):
        with reading(file, f"delete {file.stem}*: the page then goes without this moment"):
            moment = json.loads(file.read_text(encoding="utf-8"))
            if moment["step"] <= last:
                made[moment["step"]] = _read_waves(folder, file.stem, len(captions))
                seconds += moment["seconds"]
    return Moments(captions, references, dict(sorted(made.items())), seconds)


def _read_waves(folder: Path, name: str, n: int) -> list[np.ndarray]:
    return [read_wav(folder / f"{name}-{k}.wav") for k in range(n)]
