"""Previews of a run while it is trained: four sounds, and a rough number on validation clips.

The network is handed in as `make(inputs, seeds, quick) -> waves (n, N)`: inputs are captions, or band-limited
waves (n, N) in super-resolution; quick asks for fewer steps.

Public: preview, CUTOFF.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from parts.audio import first_seconds
from parts.band_limit import band_limit
from parts.scoring import preview_clips, quick_caption_metrics, quick_superresolution_metric
from parts.spectrograms import draw_previews

CUTOFF = 2_000  # Hz, of the band-limited input


def preview(folder: Path, step: int, config: dict, val_set, make, n: int = 4) -> dict:
    """Write n previews (wav + spectrograms), always from the same noise, and return quick metrics: event-set
    accuracy by the development judge, or LSD-HF and the energy score. Rough: for curves, not for tables."""
    # Folders are often sorted by class: different captions go first, repeats last.
    captions = [val_set.caption(i) for i in range(len(val_set))]
    chosen = sorted(range(len(captions)), key=lambda i: captions.index(captions[i]) < i)[:n]
    shown = [captions[i] for i in chosen]
    real = np.stack([first_seconds(val_set.wave(i), config["seconds"]) for i in chosen])
    superresolution = config["task"] == "sr"
    inputs = np.stack([band_limit(x, CUTOFF) for x in real]) if superresolution else shown
    draw_previews(folder, step, list(zip(shown, real, make(inputs, list(range(len(real))), False))))

    clips = min(preview_clips(config), len(val_set))
    if superresolution:
        reals = [first_seconds(val_set.wave(i), config["seconds"]) for i in range(clips)]
        muffled = np.stack([band_limit(x, CUTOFF) for x in reals])
        samples = [make(muffled, list(range(first, first + clips)), True) for first in (0, clips)]
        return quick_superresolution_metric(reals, samples, CUTOFF)
    if config["data"] != "soundworld":
        return {}
    return quick_caption_metrics(val_set, make(captions[:clips], list(range(clips)), True), clips)
