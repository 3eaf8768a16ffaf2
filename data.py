"""What a batch is made of: random crops of random clips, with their captions or band-limited versions.

Idea.  Training needs pairs (sound, caption), and does not care where they come from: synthesis
(parts/soundworld.py), folders of recordings (parts/recordings.py; their csv: parts/caption_tables.py) or a
mixture stand behind one interface, `open_data`. Every clip is encoded once (`prepare`); a step reads random
crops from a memory map.

    data set --prepare--> latents z of each clip, token ids of its captions, teacher features phi
    draw_batch(rng of the step) --> x0 (B, T, C), mask (B, T), cond (B, T, C) or a caption, phi (B, T, F)
    add_noise(density of t)     --> and eps (B, T, C), t (B,), which conditions are dropped

Conventions: t in [0, 1], t = 1 is noise, t = 0 is data. B batch, T tokens, C latent channels, F teacher
features.

Public: Crops, choose_crops, read_crops, draw_batch, to_tensors, add_noise, validation_batches, split_batch.
Of parts/batches.py Prefetcher, of parts/latents.py LatentCache, of parts/preparation.py open_data, open_set,
TrainingData, prepare.

    python data.py            # demo: five scenes, worded and measured
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parts.batches import Prefetcher, to_device
from parts.config import Config
from parts.latents import LatentCache
from parts.preparation import TrainingData, open_data, open_set, prepare
from parts.soundworld import NAMES, SoundWorld

__all__ = ["Crops", "LatentCache", "Prefetcher", "TrainingData", "add_noise", "choose_crops", "draw_batch",
           "open_data", "open_set", "prepare", "read_crops", "split_batch", "to_tensors",
           "validation_batches"]


class Crops(NamedTuple):
    """What a batch is read from."""
    i: np.ndarray                              # (B,) clips
    wording: np.ndarray                        # (B,) random integers; modulo a clip's number of captions
    start: np.ndarray                          # (B,) first token
    variant: np.ndarray                        # (B,) which band-limited version


def choose_crops(latents: LatentCache, muffled: LatentCache | None, batch: int, length: int, rng,
                 rows: slice = slice(None)) -> Crops:
    """Random clips (uniform, or with probabilities latents.p), wordings and crops. rng: a numpy Generator, a
    fresh one each step, so that a resumed run needs no saved state. All of the batch is drawn, and its `rows`
    returned: on several devices each reads its own."""
    if latents.p is None:
        clips = rng.integers(0, len(latents), batch)
    else:
        clips = rng.choice(len(latents), batch, p=latents.p)
    wording, places = rng.integers(0, 1 << 16, batch), []
    for last in np.maximum(0, latents.where[clips + 1] - latents.where[clips] - length):
        start = int(rng.integers(0, last + 1))
        variant = int(rng.integers(max(1, muffled.variants))) if muffled is not None else 0
        places.append((start, variant))
    start, variant = np.array(places).T
    return Crops(*(x[rows] for x in (clips, wording, start, variant)))


def read_crops(crops: Crops, latents: LatentCache, muffled: LatentCache | None, length: int,
               phi: LatentCache | None = None) -> dict:
    """The crops themselves, padded with a mask.

    Returns arrays: i (B,) clip indices, wording (B,), x0 (B, T, C), mask (B, T) True where there is sound;
    for super-resolution cond (B, T, C), the crop of a band-limited version scaled to one level, and x0 scaled
    by the same gain; with `phi` phi (B, T, F), features of the same crop unscaled."""
    B = len(crops.i)
    drawn = {"i": crops.i, "wording": crops.wording, "mask": np.zeros((B, length), bool),
             "x0": np.zeros((B, length, latents.channels), np.float32)}
    if muffled is not None:
        drawn["cond"] = np.zeros_like(drawn["x0"])
    if phi is not None:
        drawn["phi"] = np.zeros((B, length, phi.channels), np.float32)
    for j, (i, start, variant) in enumerate(zip(crops.i, crops.start, crops.variant)):
        if muffled is None:
            x = latents.crop(i, start, length)
        else:
            cond, x = muffled.pair(i, start, length, variant)
            drawn["cond"][j, : len(x)] = cond
        drawn["x0"][j, : len(x)], drawn["mask"][j, : len(x)] = x, True
        if phi is not None:
            drawn["phi"][j, : len(x)] = phi.crop(i, start, length)
    return drawn


def draw_batch(latents: LatentCache, muffled: LatentCache | None, batch: int, length: int, rng,
               phi: LatentCache | None = None) -> dict:
    """choose_crops, then read_crops. (`phi` draws nothing: the batch stays the same.)"""
    return read_crops(choose_crops(latents, muffled, batch, length, rng), latents, muffled, length, phi)


def to_tensors(drawn: dict, token_ids: list) -> dict[str, Tensor]:
    """What was drawn -> tensors: x0, mask where a clip is padded, cond or ids (B, S)[, phi][, eps]."""
    names = ("x0", "cond", "phi", "ids", "eps")            # the last two, where they are at hand already
    batch = {name: torch.as_tensor(drawn[name]) for name in names if name in drawn}
    if not drawn["mask"].all():
        batch["mask"] = torch.from_numpy(drawn["mask"])
    if "cond" not in drawn and "ids" not in drawn:
        captions = [token_ids[i][k % len(token_ids[i])] for i, k in zip(drawn["i"], drawn["wording"])]
        batch["ids"] = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    return batch


def add_noise(drawn: dict, token_ids: list, cfg: Config, generator: torch.Generator, density, size: int = 0,
              rows: slice = slice(None)) -> dict:
    """Arrays of draw_batch -> tensors on the device: x0, eps (B, T, C), t (B,), drop (B,), mask (B, T) where
    a clip is padded, ids (B, S) or cond (B, T, C)[, phi (B, T, F)]. density: of t, as sampler.LogitNormal.

    Noise is drawn on the CPU, so that it is the same whatever the device, and for all `size` clips of the
    batch of which these are `rows`, so that it is the same on any number of devices."""
    batch = to_tensors(drawn, token_ids)
    size = size or len(batch["x0"])
    if "eps" not in batch:                                 # else drawn ahead, from the same generator
        batch["eps"] = torch.randn(size, *batch["x0"].shape[1:], generator=generator)[rows]
    batch["t"] = density.sample(size, generator)[rows]
    batch["drop"] = torch.rand(size, generator=generator)[rows] < cfg.cond_drop
    return to_device(batch, cfg.device)


def validation_batches(clips: TrainingData, cfg: Config, density) -> list[dict]:
    """Two batches of 64 clips, drawn with replacement from the validation clips, the same clips and noise all
    through a run; whoever uses them sets t."""
    batches = []
    for k in range(2):
        rng, generator = np.random.default_rng([cfg.seed, 9, k]), torch.Generator().manual_seed(9_000 + k)
        drawn = draw_batch(clips.val_latents, clips.val_muffled, 64, clips.T, rng)
        batches.append(add_noise(drawn, clips.val_token_ids, cfg, generator, density))
    return batches


def split_batch(batch: dict, n: int) -> list[dict]:
    """A batch cut into n equal parts (gradient accumulation); n divides it (parts/config.py checks that)."""
    return [dict(zip(batch, part)) for part in zip(*(value.chunk(n) for value in batch.values()))]


def demo() -> None:
    """Five scenes: caption, true factors, and what a level meter says."""
    world = SoundWorld("val", 5)
    for i in range(5):
        x, factors = world.wave(i), world.factors(i)
        assert np.array_equal(x, SoundWorld("val", 5).wave(i)) and np.abs(x).max() <= 0.951
        sounds = np.flatnonzero(factors["presence"])
        events = ", ".join(f"{NAMES[k]} at {factors['onset'][k]:.2f} s" for k in sounds)
        level = f"peak {np.abs(x).max():.2f}  rms {np.sqrt(np.mean(x**2)):.3f}"
        print(f"{world.caption(i):58s} | {events:52s} | {level}")


if __name__ == "__main__":
    demo()
