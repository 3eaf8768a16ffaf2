"""Latents of clips: encoded once, then read from a memory map.

    data set + codec --LatentCache--> z (T, C) of each clip, float16; random crops of it are what training
    reads

A codec is anything with `key`, `channels`, `tokens(n)` and `encode(wav)`, so teacher features
(parts/teacher.py) are cached by the same code. B batch, N samples, T tokens, C latent channels.

Public: LatentCache, training_pairs.
"""
from __future__ import annotations

import multiprocessing

import numpy as np
import torch

from parts.audio import ACTIVE_RMS, RATE, active_rms, gains_to_level
from parts.band_limit import BAND_LIMIT_VERSION, random_band_limit
from parts.cache import cache_dir, chunk_of, digest, fill_array

PAIRS_VERSION = 2  # raise when training_pairs changes: caches are keyed by it
# A clip of which hardly anything is left under the cutoff is amplified only until the clip itself is 20 dB
# above ACTIVE_RMS. With 60 dB the shipped model put up to 74 dB too much treble on other people's recordings.
LOUDEST = 10 * ACTIVE_RMS


class LatentCache:
    """Latents of every clip of a data set, concatenated along time in one float16 memory map, keyed by data +
    codec.

    variants = 0: the clips themselves. variants = R > 0, for super-resolution: R randomly band-limited
    versions of each clip (version r of clip i depends on (i, r) alone), each at the level ACTIVE_RMS as it
    will be in use, and after them R times the clip itself, with the gain of each; channels side by side: (sum
    T, 2 R C)."""

    def __init__(self, data, codec, variants: int = 0, workers: int | None = None):
        self.variants, self.channels = variants, codec.channels
        self.p = getattr(data, "p", None)                  # probability of each clip, where they differ
        lengths = data.lengths()
        tokens = [codec.tokens(n) for n in lengths]
        self.where = np.concatenate([[0], np.cumsum(tokens)])      # clip i owns rows where[i]:where[i + 1]
        versions = (BAND_LIMIT_VERSION, PAIRS_VERSION) if variants else ()
        folder = cache_dir() / f"latents-{digest(data.key, codec.key, variants, *versions)}"
        shape = (self.where[-1], self.channels * max(1, 2 * variants))
        # Band-limiting is scipy work and spreads over processes; plain encoding is one batched STFT and stays
        # here.
        spreads = variants and getattr(codec, "spreads", False)
        self.z = fill_array(folder, "z", shape, np.float16, _encode_chunk, len(data), (data, codec, variants),
                            chunk_of(lengths), workers if spreads else 0,
                            "encoding" + (" muffled" if variants else ""), self.where)

    def __len__(self) -> int:
        return len(self.where) - 1

    def pair(self, i: int, start: int, length: int, variant: int) -> tuple[np.ndarray, np.ndarray]:
        """The same crop of a band-limited version and of the clip at the same gain."""
        return self.crop(i, start, length, variant), self.crop(i, start, length, self.variants + variant)

    def crop(self, i: int, start: int, length: int, variant: int = 0) -> np.ndarray:
        """Tokens [start, start + length) of clip i (fewer at its end), (<= length, C) float32."""
        first = self.where[i] + start
        last = min(first + length, self.where[i + 1])
        channels = slice(variant * self.channels, (variant + 1) * self.channels)
        return np.asarray(self.z[first:last, channels], np.float32)


def training_pairs(muffled: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Band-limited versions (R, N) of a clip (N,) -> at the level ACTIVE_RMS, then the clip with the same
    gains, which are limited to what makes it LOUDEST: (2 R, N)."""
    gains = gains_to_level(muffled, ACTIVE_RMS)                    # (R, 1)
    gains = gains.clip(0, LOUDEST / max(active_rms(x), 1e-12))
    return np.concatenate([muffled * gains, x * gains]).astype(np.float32)


def _encode_chunk(indices, data, codec, variants: int) -> np.ndarray:
    """Latents of some clips, concatenated along time."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one thread a worker: more would fight over the cores
        data.prepare(0)           # maps the cache, which exists by now
    waves = [data.wave(i) for i in indices]
    if not variants and len({len(x) for x in waves}) == 1:  # equal lengths: one batch
        return codec.encode(torch.from_numpy(np.stack(waves))).flatten(0, 1).numpy().astype(np.float16)
    latents = []
    for i, x in zip(indices, waves):
        if variants:
            z = _encode_pairs(x, i, codec, variants)                               # (2 R, T, C)
        else:
            z = codec.encode(torch.from_numpy(x[None]))                            # (1, T, C)
        latents.append(z.permute(1, 0, 2).reshape(z.shape[1], -1).numpy())         # (T, 2 R C) or (T, C)
    return np.concatenate(latents).astype(np.float16)


def _encode_pairs(x: np.ndarray, i: int, codec, variants: int) -> torch.Tensor:
    """Latents (2 R, T, C) of the training pairs of clip i (N,): all versions at once, of a recording of more
    than a minute one by one."""
    at_once = variants if len(x) <= 60 * RATE else 1
    muffled, clean = [], []
    for first in range(0, variants, at_once):
        versions = [random_band_limit(x, np.random.default_rng([77, i, r]))[0]
                    for r in range(first, min(first + at_once, variants))]
        z = codec.encode(torch.from_numpy(training_pairs(np.stack(versions), x)))
        muffled.append(z[: len(versions)])
        clean.append(z[len(versions) :])
    return torch.cat([*muffled, *clean])
