"""Waveforms: the project's sampling rate, resampling, cutting, writing. Everything here is numpy, (N,)
float32 in [-1, 1].

Public: RATE, CLIP_S, resample, first_seconds, in_segments, write_wav.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io.wavfile
import scipy.signal
from tqdm import tqdm

RATE = 16_000  # Hz; every waveform inside the project has this rate
CLIP_S = 2.56  # s; 40,960 samples = 128 codec frames = 64 tokens


def resample(x: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling (scipy), (N,) -> (ceil(N to / rate),) float32."""
    if rate == to:
        return x.astype(np.float32)
    divisor = np.gcd(int(rate), int(to))
    return scipy.signal.resample_poly(x, to // divisor, rate // divisor).astype(np.float32)


def first_seconds(x: np.ndarray, seconds: float) -> np.ndarray:
    """The first `seconds` of (N,); a shorter clip is padded with silence."""
    n = round(seconds * RATE)
    return np.pad(x[:n], (0, max(0, n - len(x))))


def in_segments(process, x: np.ndarray, segment: int, fade: int, desc: str = "") -> np.ndarray:
    """Process a long recording (N,) piece by piece -> (N,), so that memory does not grow with its length.

    process(piece (n,), k) -> (n,): the k-th piece, of `segment` samples or fewer. Pieces overlap by `fade`
    samples, over which they are cross-faded linearly. desc: of the progress bar, which is shown where there
    are several pieces."""
    starts = [0] if len(x) <= segment else list(range(0, len(x) - fade, segment - fade))
    out, weight = np.zeros(len(x)), np.zeros(len(x))
    for k, start in enumerate(tqdm(starts, desc=desc, unit="segment", disable=not desc or len(starts) == 1)):
        piece = x[start : start + segment]
        n, ramp = len(piece), np.ones(len(piece))
        if k > 0:
            ramp[:fade] = np.linspace(0, 1, fade + 1)[1:][:n]
        if start + segment < len(x):
            ramp[-fade:] *= np.linspace(1, 0, fade + 1)[:-1]
        out[start : start + n] += ramp * process(piece, k)
        weight[start : start + n] += ramp
    return (out / weight.clip(1e-9)).astype(np.float32)


def write_wav(path: str | Path, x: np.ndarray) -> None:
    """Write (N,) float in [-1, 1] as 16-bit 16 kHz wav (scipy); louder sounds are scaled down, never
    clipped."""
    x = np.asarray(x, np.float64)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    peak = max(1.0, np.abs(x).max(initial=0))
    scipy.io.wavfile.write(path, RATE, np.round(x / peak * 32_767).astype(np.int16))
