"""Previews of a run while it is trained: four sounds, and a rough number on validation clips.

The network is handed in as `make(inputs, seeds) -> waves (n, N)`: inputs are captions, or band-limited waves
(n, N) in super-resolution.

Public: write_previews, quick_metrics, shown_clips, QUICK_STEPS, SAMPLED_TWICE.
"""
from __future__ import annotations

import numpy as np

from parts.audio import first_seconds
from parts.background import at_once
from parts.band_limit import CUTOFF, band_limit
from parts.scoring import quick_caption_metrics, quick_superresolution_metric
from parts.spectrograms import draw_previews

QUICK_STEPS = 12    # Euler steps of metrics while a run is trained
SAMPLED_TWICE = 24  # captions: clips whose texture is compared


def shown_clips(val_set, config: dict, n: int = 4) -> tuple[list[str], np.ndarray, list[str] | np.ndarray]:
    """-> n captions of a validation set, their clips (n, N), and what the network is given: the captions, or
    the clips band-limited (n, N)."""
    # Folders are often sorted by class: different captions go first, repeats last.
    captions = [val_set.caption(i) for i in range(len(val_set))]
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    chosen = sorted(range(len(captions)), key=lambda i: first[captions[i]] != i)[:n]
    shown = [captions[i] for i in chosen]
    real = np.stack([first_seconds(val_set.wave(i), config["seconds"]) for i in chosen])
    if config["task"] == "sr":
        return shown, real, np.stack([band_limit(x, CUTOFF) for x in real])
    return shown, real, shown


def write_previews(run, val_set, make, background=at_once) -> None:
    """Four previews of a run (evaluate.Run), always of the same clips and from the same noise: wav and
    spectrograms. background: see parts/background.py."""
    captions, real, inputs = shown_clips(val_set, run.config)
    made = make(inputs, list(range(len(real))))
    background(draw_previews, run.path, run.step, list(zip(captions, real, made)))


def quick_metrics(config: dict, val_set, make, clips: int, twice: int, device="cpu", judge="dev") -> dict:
    """Of the first clips of a set: event-set accuracy by a judge, factors and, of `twice` of them, the
    texture score; or LSD-HF and the energy score, of all; and of how many clips they are (measured_on,
    texture_measured_on). {}: recordings, whose events nobody knows."""
    clips = min(clips, len(val_set))
    if config["task"] == "sr":
        reals = [first_seconds(val_set.wave(i), config["seconds"]) for i in range(clips)]
        muffled = np.stack([band_limit(x, CUTOFF) for x in reals])
        samples = [make(muffled, list(range(first, first + clips))) for first in (0, clips)]
        return {**quick_superresolution_metric(reals, samples, CUTOFF), "measured_on": clips}
    if config["data"] != "soundworld":
        return {}
    captions = [val_set.caption(i) for i in range(clips)]
    made = make(captions, list(range(clips)))
    twice = min(clips, twice)
    again = make(captions[:twice], list(range(clips, clips + twice)))
    found = quick_caption_metrics(val_set, made, clips, again, device, judge)
    return {**found, "measured_on": clips, "texture_measured_on": twice}
