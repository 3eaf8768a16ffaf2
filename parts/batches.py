"""The clips and the noise of each step, on the device before they are waited for.

Idea.  What a step is trained on depends on (seed, step) and not on the step before, so on a GPU it is made
ready while that one computes. Latents, features and captions live on the GPU, if they fit, and crops of them
are gathered there by index; where they don't, a thread reads them into pinned memory, from which copies need
not be waited for. Noise is drawn on the CPU, so that it is the same on every device, by that thread as well.

    crops (clip, wording, start, variant) --Resident.read--> x0, cond (B, T, C), phi (B, T, F), ids (B, S)
                                          --read, pinned-->  the same from disk
    seed, step --thread--> eps (B, T, C), pinned

On a CPU nothing of this happens: clips are read when they are asked for. Captions are padded to a multiple of
16 words on a GPU, so that compiled code meets few shapes.

B batch, T tokens, C latent channels, F teacher features, S words.

Public: Prefetcher, cut_rows, padded_words, to_device.
"""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parts.devices import RANK, WORLD
from parts.pretrained_text import CachedText
from parts.text import MAX_WORDS

SHARE = 1 / 3      # of the free memory of a GPU that may hold the data
AT_A_TIME = 1 << 18  # rows of an array that are copied to a GPU at a time
WORDS_STEP = 16    # captions are padded to a multiple of it


# --- arrays on the device -------------------------------------------------------------------------------

def cut_rows(rows: Tensor, first: Tensor, count: Tensor, length: int,
             variant: Tensor | None = None) -> Tensor:
    """Pieces of rows (N, ...), or of one variant each of rows (N, V, ...): count (B,) rows from first (B,) on
    -> (B, length, ...), zeros behind the end of each. All on one device, whose host need not wait."""
    offsets = torch.arange(length, device=rows.device)
    index = (first[:, None] + offsets).clamp_max(len(rows) - 1)    # (B, length)
    pieces = rows[index] if variant is None else rows[index, variant[:, None]]
    behind = offsets >= count[:, None]
    return pieces.masked_fill(behind.reshape(*behind.shape, *[1] * (pieces.ndim - 2)), 0)


def padded_words(longest: int, embedded: bool) -> int:
    """The length S to which captions are padded on a GPU, for a batch whose longest has so many. embedded:
    the rows are those of a frozen encoder, whose first is the pooled one."""
    words = longest - embedded
    padded = -(-words // WORDS_STEP) * WORDS_STEP + embedded
    return padded if embedded else min(padded, MAX_WORDS)


def _copy_to(array: np.ndarray, device: str) -> Tensor:
    """A memory map, piece by piece: all of it need not fit into the host's memory."""
    rows = torch.empty(array.shape, dtype=torch.from_numpy(np.array(array[:0])).dtype, device=device)
    for start in range(0, len(array), AT_A_TIME):
        rows[start : start + AT_A_TIME] = torch.from_numpy(np.array(array[start : start + AT_A_TIME]))
    return rows


class _Captions:
    """Wordings of all clips, one after another: rows (N,) ids or (N, E) embeddings."""

    def __init__(self, token_ids):
        self.embedded = isinstance(token_ids, CachedText)
        if self.embedded:                                          # equal captions are stored once
            self.rows, self.offsets = token_ids.z, token_ids.offsets
            self.of_clip = [[token_ids.index[caption] for caption in wordings]
                            for wordings in token_ids.captions]
            return
        wordings = [ids.numpy() for of_clip in token_ids for ids in of_clip]
        self.rows = np.concatenate(wordings)
        self.offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in wordings])])
        counts = [len(of_clip) for of_clip in token_ids]
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.of_clip = [range(start, start + count) for start, count in zip(starts, counts)]

    def find(self, clips: np.ndarray, wording: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row and number of rows of the wording that each clip (B,) is given."""
        which = np.array([self.of_clip[i][k % len(self.of_clip[i])] for i, k in zip(clips, wording)])
        return self.offsets[which], self.offsets[which + 1] - self.offsets[which]


def _arrays(data) -> tuple:
    """What a run's batches are read from: latents, phi or None, captions or None."""
    phi = None if data.phi is None else data.phi.z
    if data.muffled is None:
        return data.latents.z, phi, _Captions(data.token_ids)
    return data.muffled.z, phi, None


class Resident:
    """A run's clips on a GPU. data: parts.preparation.TrainingData."""

    def __init__(self, data, device: str):
        self.data, self.device = data, device
        self.pairs = data.muffled is not None              # super-resolution: both sides stand in one array
        z, phi, self.captions = _arrays(data)
        self.z, self.phi = _copy_to(z, device), None if phi is None else _copy_to(phi, device)
        if self.pairs:
            self.z = self.z.reshape(len(z), -1, data.latents.channels)     # (N, 2 R, C)
        self.words = _copy_to(self.captions.rows, device) if self.captions else None

    @staticmethod
    def size(data) -> int:
        """Bytes that it takes."""
        z, phi, captions = _arrays(data)
        arrays = [z, phi, captions.rows if captions else None]
        return sum(array.nbytes for array in arrays if array is not None)

    def read(self, crops, with_phi: bool) -> dict:
        """Crops of data.choose_crops -> arrays as data.read_crops gives them, but x0, cond, phi and ids are
        tensors on the device."""
        T, where = self.data.T, self.data.latents.where
        first = where[crops.i] + crops.start
        count = np.minimum(T, where[crops.i + 1] - first)
        text = self.captions.find(crops.i, crops.wording) if self.captions else ()
        numbers = np.stack([first, count, crops.variant, *text])
        numbers = to_device({"numbers": torch.from_numpy(numbers)}, self.device)["numbers"]

        def cut(rows: Tensor, variant: Tensor | None = None) -> Tensor:
            return cut_rows(rows, numbers[0], numbers[1], T, variant).float()
        found = {"i": crops.i, "wording": crops.wording, "mask": np.arange(T) < count[:, None]}
        if self.pairs:
            R = self.data.muffled.variants
            found |= {"x0": cut(self.z, R + numbers[2]), "cond": cut(self.z, numbers[2])}
        else:
            S = padded_words(int(text[1].max()), self.captions.embedded)
            ids = cut_rows(self.words, numbers[3], numbers[4], S)
            found |= {"x0": cut(self.z), "ids": ids.float() if self.captions.embedded else ids}
        if with_phi:
            found["phi"] = cut(self.phi)
        return found


# --- on their way ---------------------------------------------------------------------------------------

def to_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Tensors on the device; on a GPU by way of pinned memory, so that nobody waits, and captions padded."""
    if not str(device).startswith("cuda"):
        return {name: value.to(device) for name, value in batch.items()}
    ids = batch.get("ids")
    if ids is not None and not ids.is_cuda:
        more = padded_words(ids.shape[1], ids.ndim == 3) - ids.shape[1]
        batch = {**batch, "ids": F.pad(ids, (0, 0) * (ids.ndim - 2) + (0, more))}
    return {name: value if value.is_cuda else value.pin_memory().to(device, non_blocking=True)
            for name, value in batch.items()}


class Prefetcher:
    """The clips of each step: what is drawn depends on (seed, step) alone. `rows`: those of the batch that
    this process takes. On a GPU a thread makes ready the next step meanwhile.

    choose, read: data.choose_crops and data.read_crops. data: parts.preparation.TrainingData."""

    def __init__(self, cfg, data, choose, read):
        self.cfg, self.data, self.choose, self.read_crops = cfg, data, choose, read
        self.rows = slice(RANK * cfg.batch // WORLD, (RANK + 1) * cfg.batch // WORLD)
        self.pool = self.resident = self.next = None       # next: (step, with_phi), the promise of its draw
        if cfg.device.startswith("cuda"):
            self.pool = ThreadPoolExecutor(1)
            needed, free = Resident.size(data), torch.cuda.mem_get_info(cfg.device)[0]
            if needed <= SHARE * free:
                self.resident = Resident(data, cfg.device)
            else:
                print(f"note: {needed / 1e9:.1f} GB of latents are read from disk step by step; on the GPU "
                      f"they may take a third of the {free / 1e9:.1f} GB that are free")

    def draw(self, step: int, with_phi: bool) -> tuple:
        """-> what is drawn of the clips, and the generator of everything else that is random in the step."""
        cfg, data, rng = self.cfg, self.data, np.random.default_rng([self.cfg.seed, 1, step])
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        crops = self.choose(data.latents, data.muffled, cfg.batch, data.T, rng, self.rows)
        if self.pool is None:
            return self.read(crops, with_phi), generator

        # For a GPU: read, and noise drawn, into memory from which copies need not be waited for.
        eps = torch.randn(cfg.batch, data.T, data.latents.channels, generator=generator)[self.rows]
        drawn = {"crops": crops, "eps": eps.pin_memory()}
        if self.resident is None:
            for name, array in self.read(crops, with_phi).items():
                is_input = name in ("x0", "cond", "phi")
                drawn[name] = torch.from_numpy(array).pin_memory() if is_input else array
        return drawn, generator

    def read(self, crops, with_phi: bool) -> dict:
        data = self.data
        return self.read_crops(crops, data.latents, data.muffled, data.T, data.phi if with_phi else None)

    def __call__(self, step: int, with_phi: bool) -> tuple:
        known, promise = self.next or (None, None)
        if known == (step, with_phi):
            drawn, generator = promise.result()
        else:
            drawn, generator = self.draw(step, with_phi)
        if self.pool:
            self.next = (step + 1, with_phi), self.pool.submit(self.draw, step + 1, with_phi)
        if self.resident:
            drawn |= self.resident.read(drawn["crops"], with_phi)
        return drawn, generator
