"""The embedded SSL teacher, and its features phi at the times of tokens.

Idea.  Guidance (guidance.py) pulls hidden states towards phi(x0), the regime (regime.py) measures how far
phi of a prediction is from phi of the clip. Both need one feature vector for each token of a latent sequence.
The teacher works on the codec's log-mel frames, so that predictions can be measured without a vocoder.

    z (B, T, C) --codec.decode_mel--> log-mel (B, 2 T, 64) --Teacher--> phi (B, T, F)          F = 192
    z (B, T, C) --codec.decode--> wav (B, N) --another teacher--> (B, T', F') --align_to_tokens--> (B, T, F')

The teacher is pretrained on random patches (parts/patches.py, lab/pretrain_teacher.py): no recording, no
label, none of the sounds that the judges know. How good it is: lab/probe_teacher.py.

Another one: `python train.py --teacher FOLDER_OR_HUB_ID [--teacher-layer N]`; which families fit, and what a
new one needs, is in parts/pretrained_teacher.py. Controls: `--teacher random` and `--teacher shuffled`.

A teacher, embedded or pretrained, has

    takes        "mel" (log-mel frames) or "wave" (16 kHz): what it is called with
    features     F
    rate, first  frame j of its output is centred at first + j / rate seconds

B batch, N samples, T tokens, T' frames of the teacher, C latent channels, F features.

Public: WEIGHTS, Teacher, align_to_tokens, TeacherFeatures, feature_mean, pool, load_teacher, random_teacher.
"""
from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from parts.audio import RATE
from parts.checkpoints import load_frozen

WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "teacher.safetensors"
MEAN_OVER = 20 * 60  # s of sound that the data-set mean of phi is taken over


# --- the network ----------------------------------------------------------------------------------------


def _conv2d(channels_in: int, channels_out: int, kernel: int, stride: tuple[int, int]) -> nn.Sequential:
    """Convolution over time and frequency; stride: of both."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def _context_layer(features: int, dilation: int) -> nn.Sequential:
    """Residual branch over time: three frames, `dilation` apart."""
    return nn.Sequential(
        nn.BatchNorm1d(features),
        nn.Conv1d(features, features, 3, padding=dilation, dilation=dilation),
        nn.ReLU(),
        nn.Conv1d(features, features, 1),
    )


class Teacher(nn.Module):
    """Small convolutional encoder: log-mel (B, 2 T, 64) -> features (B, T, F), 25 a second. Frozen after
    pretraining."""

    takes = "mel"
    rate = 25.0   # frames a second
    first = 0.02  # s, centre of frame 0

    def __init__(self, features: int = 192):
        super().__init__()
        self.features = features
        self.stem = nn.Sequential(
            _conv2d(1, 16, 5, (2, 2)),
            _conv2d(16, 32, 3, (1, 2)),
            _conv2d(32, 64, 3, (1, 2)),
            _conv2d(64, 128, 3, (1, 2)),
        )
        self.join = nn.Linear(128 * 4, features)
        # They reach 1 + 2 + 4 frames, 0.28 s, to each side; with the stem 0.44 s.
        self.context = nn.ModuleList(_context_layer(features, dilation) for dilation in (1, 2, 4))
        self.norm = nn.LayerNorm(features)

    def forward(self, mel: Tensor) -> Tensor:
        # The mels of SoundWorld and ESC-10 have mean -4 and deviation 2.5.
        h = self.stem((mel[:, None] + 4) / 2.5)                    # (B, 128, T, 4)
        h = self.join(rearrange(h, "b c t m -> b t (c m)")).mT     # (B, F, T)
        for layer in self.context:
            h = h + layer(h)
        return self.norm(h.mT)                                     # (B, T, F)


def load_teacher(path: Path = WEIGHTS) -> Teacher:
    """The shipped teacher, frozen, float32, eval mode. FileNotFoundError where the weights are missing."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: missing; make it with: python -m lab.pretrain_teacher --out {path}")
    return load_frozen(Teacher(), path)


def random_teacher(seed: int) -> Teacher:
    """The same network, not pretrained: the control. Draws nothing from the common random stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 50_000)
        return Teacher().eval().requires_grad_(False)


# --- features at the times of tokens --------------------------------------------------------------------


def align_to_tokens(phi: Tensor, rate: float, first: float, token_rate: float, T: int) -> Tensor:
    """Features at the times of tokens: phi (B, T', F) -> (B, T, F).

    Frame j of phi is centred at first + j / rate seconds, token i spans [i, i + 1) / token_rate. Frames finer
    than tokens are averaged over each token's span (exactly: parts of frames count in part); coarser ones are
    interpolated linearly at its centre. At the ends the nearest frame stands in."""
    if rate == token_rate and phi.shape[1] == T and abs(first - 0.5 / rate) < 1e-6:
        return phi
    centres = (torch.arange(T, dtype=torch.float64) + 0.5) / token_rate    # (T,) s
    if rate < token_rate:
        return _interpolate(phi, (centres - first) * rate)
    return _average(phi, rate, first, centres, token_rate)


def _interpolate(phi: Tensor, places: Tensor) -> Tensor:
    """phi (B, T', F) at fractional frame numbers (T,) -> (B, T, F)."""
    frames = phi.shape[1]
    x = places.clamp(0, frames - 1)
    left = x.floor().long().clamp(max=max(0, frames - 2))
    right = (left + 1).clamp(max=frames - 1)
    part = (x - left).to(phi)[:, None]                             # (T, 1): the share of the right one
    return phi[:, left] * (1 - part) + phi[:, right] * part


def _average(phi: Tensor, rate: float, first: float, centres: Tensor, token_rate: float) -> Tensor:
    """Mean of phi (B, T', F) over the span of each token, (B, T, F). centres: of the tokens, (T,) s."""
    # Frame j spans [edges_j, edges_j+1).
    edges = (torch.arange(phi.shape[1] + 1, dtype=torch.float64) - 0.5) / rate + first   # (T' + 1,) s
    ends = torch.minimum(edges[1:], centres[:, None] + 0.5 / token_rate)
    starts = torch.maximum(edges[:-1], centres[:, None] - 0.5 / token_rate)
    overlap = (ends - starts).clamp_min(0)                         # (T, T') s that token i and frame j share

    # A token beyond the last frame takes the nearest one.
    none = overlap.sum(1) < 1e-9
    distance = (centres[none, None] - (edges[1:] + edges[:-1]) / 2).abs()
    overlap[none, distance.argmin(1)] = 1.0
    return (overlap / overlap.sum(1, keepdim=True)).to(phi) @ phi


class TeacherFeatures(nn.Module):
    """phi on the codec's latents: z (B, T, C) -> (B, T, F), one feature vector a token, by way of the mel
    frames or the sound that they stand for.

    Also a codec in the sense of parts.latents.LatentCache (key, channels, tokens, encode), so that features
    are cached as latents are. The codec is copied: it moves to a device together with the teacher, and the
    caller's stays where it is."""

    def __init__(self, codec: nn.Module, teacher: nn.Module):
        super().__init__()
        self.codec = copy.deepcopy(codec)
        self.teacher = teacher.to(codec.mean.device)               # a neural codec may be on a GPU by now
        self.channels = teacher.features
        self.tokens = codec.tokens
        # Features of another codec or teacher must not be taken from this one's cache.
        self.key = f"{codec.key}-phi-{_teacher_key(teacher)}"

    def _align(self, phi: Tensor, T: int) -> Tensor:
        return align_to_tokens(phi, self.teacher.rate, self.teacher.first, self.codec.rate, T)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        """z (B, T, C) -> phi (B, T, F), in the teacher's own precision whatever the network's is."""
        with torch.autocast(z.device.type, enabled=False):
            if self.teacher.takes == "mel":
                phi = self.teacher(self.codec.decode_mel(z.float()))
            else:
                phi = self.teacher(self.codec.decode(z.float()))
        return self._align(phi, z.shape[1])

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> (B, T, F) on the input's device. A teacher of waves gets the recording itself, not what
        the codec leaves of it."""
        device = self.codec.mean.device
        if self.teacher.takes == "mel":
            return self(self.codec.encode(wav).to(device)).to(wav.device)
        phi = self.teacher(wav.to(device))
        return self._align(phi, self.tokens(wav.shape[-1])).to(wav.device)


def _teacher_key(teacher: nn.Module) -> str:
    """The teacher's own key, else 16 hexadecimal digits of its weights."""
    key = getattr(teacher, "key", None)
    if key:
        return key
    weights = b"".join(value.cpu().numpy().tobytes() for value in teacher.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def feature_mean(extract: TeacherFeatures, latents, data, device: str) -> Tensor:
    """phi's data-set mean (F,): over twenty minutes of cached latents (parts.latents.LatentCache), or of
    recordings (the data set itself) for a teacher of waves."""
    # Clips in random order, because a folder's first ones may all be of one class.
    order = np.random.default_rng(0).permutation(len(data))
    ends = np.cumsum(np.asarray(data.lengths())[order])            # samples up to the end of each clip
    some = order[: max(1, int(np.searchsorted(ends, MEAN_OVER * RATE)))]

    if extract.teacher.takes == "mel":
        z = np.concatenate([latents.z[latents.where[i] : latents.where[i + 1]] for i in some])
        z = z.astype(np.float32)                                   # (tokens, C)
        z = z[np.isfinite(z).all(1)]  # one broken clip must not spoil every distance
        # One minute at a time.
        chunks = np.array_split(z, max(1, len(z) // 1_500))
        where = extract.codec.mean.device
        phi = [extract(torch.from_numpy(chunk)[None].to(where))[0] for chunk in chunks]
    else:
        phi = [extract.encode(torch.from_numpy(data.wave(int(i)))[None])[0] for i in some]
    return torch.cat(phi).mean(0).to(device)


def pool(phi: Tensor) -> Tensor:
    """Features of a whole clip: mean, deviation and maximum over time, (B, T, F) -> (B, 3 F)."""
    return torch.cat([phi.mean(1), phi.std(1), phi.amax(1)], -1)
