"""What a batch is made of: random crops of random clips, with their captions or band-limited versions.

Idea.  Training needs pairs (sound, caption), and does not care where they come from: synthesis
(parts/soundworld.py), folders of recordings (parts/recordings.py; their csv: parts/caption_tables.py) or a
mixture stand behind one interface, `open_data`. Every clip is encoded once (`prepare`); a step reads random
crops from a memory map.

    --data --prepare--> latents z of each clip, token ids of its captions, teacher features phi
    draw_batch(rng of the step) --> x0 (B, T, C), mask (B, T), cond (B, T, C) or a caption, phi (B, T, F)

Conventions: t in [0, 1], t = 1 is noise, t = 0 is data. B batch, T tokens, C latent channels, F teacher
features.

Public: draw_batch, to_tensors, split_batch, Prefetcher; from parts/preparation.py (what a
data set is, and how it is encoded): open_data, open_set, LatentCache, TrainingData, prepare.

    python data.py            # demo: five scenes, worded and measured
"""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from parts.config import Config
from parts.devices import RANK, WORLD
from parts.latents import LatentCache
from parts.preparation import TrainingData, open_data, open_set, prepare
from parts.soundworld import NAMES, SoundWorld

__all__ = ["LatentCache", "Prefetcher", "TrainingData", "draw_batch", "open_data",
           "open_set", "prepare", "split_batch", "to_tensors"]


def draw_batch(latents: LatentCache, muffled: LatentCache | None, batch: int, length: int, rng,
               phi: LatentCache | None = None, rows: slice = slice(None)) -> dict:
    """Random clips, random crops, padding with a mask. rng: a numpy Generator, one a step: resuming needs no
    state.

    All of the batch is drawn, its `rows` are read and returned: on several devices each reads its own.

    Returns arrays: i (B,) clip indices, wording (B,), x0 (B, T, C), mask (B, T) True where there is sound;
    for super-resolution cond (B, T, C), the same crop of a band-limited version; with `phi` phi (B, T, F),
    the same crop of it."""
    # Which clips, which wording, which crop of each? (`phi` draws nothing: the batch stays the same.)
    if latents.p is None:
        clips = rng.integers(0, len(latents), batch)
    else:
        clips = rng.choice(len(latents), batch, p=latents.p)
    wording, crops = rng.integers(0, 1 << 16, batch), []
    for i in clips:
        spare = int(latents.where[i + 1] - latents.where[i]) - length
        start = int(rng.integers(0, max(0, spare) + 1))
        variant = int(rng.integers(max(1, muffled.variants))) if muffled is not None else 0
        crops.append((i, start, variant))

    # Read those of this process.
    crops = crops[rows]
    B = len(crops)
    drawn = {"i": clips[rows], "wording": wording[rows], "mask": np.zeros((B, length), bool),
             "x0": np.zeros((B, length, latents.channels), np.float32)}
    if muffled is not None:
        drawn["cond"] = np.zeros_like(drawn["x0"])
    if phi is not None:
        drawn["phi"] = np.zeros((B, length, phi.channels), np.float32)
    for j, (i, start, variant) in enumerate(crops):
        if muffled is None:
            x = latents.crop(i, start, length)
        else:
            cond, x = muffled.pair(i, start, length, variant)
            drawn["cond"][j, : len(x)] = cond
        drawn["x0"][j, : len(x)], drawn["mask"][j, : len(x)] = x, True
        if phi is not None:
            drawn["phi"][j, : len(x)] = phi.crop(i, start, length)
    return drawn


def to_tensors(drawn: dict, token_ids: list) -> dict[str, Tensor]:
    """Arrays of draw_batch -> tensors: x0, mask where a clip is padded, cond or ids (B, S)[, phi]."""
    batch = {name: torch.from_numpy(drawn[name]) for name in ("x0", "cond", "phi") if name in drawn}
    if not drawn["mask"].all():
        batch["mask"] = torch.from_numpy(drawn["mask"])
    if "cond" not in drawn:
        captions = [token_ids[i][k % len(token_ids[i])] for i, k in zip(drawn["i"], drawn["wording"])]
        batch["ids"] = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    return batch


def split_batch(batch: dict, n: int) -> list[dict]:
    """A batch cut into n equal parts (gradient accumulation)."""
    if n == 1:
        return [batch]
    return [dict(zip(batch, part)) for part in zip(*(value.chunk(n) for value in batch.values()))]


class Prefetcher:
    """Draws the clips of a step; on a GPU a thread draws those of the next one meanwhile. What is drawn
    depends on (seed, step) alone. `rows`: those of the batch that this process takes."""

    def __init__(self, cfg: Config, data: TrainingData):
        self.cfg, self.data = cfg, data
        self.rows = slice(RANK * cfg.batch // WORLD, (RANK + 1) * cfg.batch // WORLD)
        self.pool = ThreadPoolExecutor(1) if cfg.device.startswith("cuda") else None
        self.next = None                                   # (step, with_phi), and the promise of its batch

    def draw(self, step: int, with_phi: bool) -> dict:
        cfg, data, rng = self.cfg, self.data, np.random.default_rng([self.cfg.seed, 1, step])
        phi = data.phi if with_phi else None
        return draw_batch(data.latents, data.muffled, cfg.batch, data.T, rng, phi, self.rows)

    def __call__(self, step: int, with_phi: bool) -> dict:
        known, promise = self.next or (None, None)
        drawn = promise.result() if known == (step, with_phi) else self.draw(step, with_phi)
        if self.pool:
            self.next = (step + 1, with_phi), self.pool.submit(self.draw, step + 1, with_phi)
        return drawn


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
