"""Waveforms: the project's sampling rate, resampling, cutting, writing. Everything here is numpy, (N,)
float32 in [-1, 1].

Public: RATE, CLIP_S, resample, resample_blocks, first_seconds, in_segments, write_wav.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, to: int) -> Iterator[np.ndarray]:
    """`resample` for a long recording (N, channels) that comes in blocks (n, channels) -> blocks whose sum of
    lengths is ceil(N to / rate): the same numbers, without the whole of it in memory."""
    if rate == to:
        yield from (block.astype(np.float32) for block in blocks)
        return
    divisor = np.gcd(int(rate), int(to))
    up, down = to // divisor, rate // divisor

    # resample_poly's filter reaches 10 max(up, down) / up samples to each side. Pieces begin and end at
    # multiples of `down`, where an output sample stands on an input sample.
    reach = down * -(-10 * max(up, down) // (up * down))
    length = down * -(-max(4 * reach, 1 << 16) // down)
    waiting, before = [], 0                                        # input not yet done; of it, context

    def resampled(x: np.ndarray, before: int, after: int) -> np.ndarray:
        y = scipy.signal.resample_poly(x, up, down, axis=0).astype(np.float32)
        return y[before * up // down : len(y) - after * up // down]
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) < before + length + reach:
            continue
        x = np.concatenate(waiting)
        n = (len(x) - before - reach) // down * down               # samples that can be done now
        yield resampled(x[: before + n + reach], before, reach)
        x = x[max(0, before + n - reach) :]
        waiting, before = [x], reach
    if waiting:
        yield resampled(np.concatenate(waiting), before, 0)


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


def write_wav(path: str | Path, x: np.ndarray) -> float:
    """Write (N,) or (N, channels) float in [-1, 1] as 16-bit 16 kHz wav (scipy); louder sounds are scaled
    down, never clipped. -> the factor of that, 1 where nothing was scaled."""
    x = np.asarray(x, np.float64)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    factor = 1 / max(1.0, np.abs(x).max(initial=0))
    scipy.io.wavfile.write(path, RATE, np.round(x * factor * 32_767).astype(np.int16))
    return factor
