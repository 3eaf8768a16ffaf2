"""TODO"""
from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "teacher.safetensors"


class Teacher(nn.Module):
    """Small convolutional encoder: log-mel (B, 2 T, 64) -> features (B, T, F), 25 a second. Frozen after pretraining."""
    takes, rate, first = "mel", 25.0, 0.02                         # what it hears; frames a second; centre of the first (s)

    def __init__(self, features: int = 192):
        super().__init__()
        conv = lambda a, b, k, stride: nn.Sequential(nn.Conv2d(a, b, k, stride, k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.features = features
        self.stem = nn.Sequential(conv(1, 16, 5, (2, 2)), conv(16, 32, 3, (1, 2)), conv(32, 64, 3, (1, 2)), conv(64, 128, 3, (1, 2)))
        self.join = nn.Linear(128 * 4, features)
        self.context = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(features), nn.Conv1d(features, features, 3, padding=d, dilation=d), nn.ReLU(),
                                                   nn.Conv1d(features, features, 1)) for d in (1, 2, 4))  # sees 0.6 s to each side
        self.norm = nn.LayerNorm(features)

    def forward(self, mel: Tensor) -> Tensor:
        h = self.stem((mel[:, None] + 4) / 2.5)                    # (B, 128, T, 4); SoundWorld's and ESC-10's mels: mean -4, deviation 2.5
        h = self.join(rearrange(h, "b c t m -> b t (c m)")).mT     # (B, F, T)
        for layer in self.context:
            h = h + layer(h)
        return self.norm(h.mT)                                     # (B, T, F)


def align_to_tokens(phi: Tensor, rate: float, first: float, token_rate: float, T: int) -> Tensor:
    """Features at the times of tokens: frame j of phi (B, T', F) is centred at first + j / rate seconds, token i spans [i, i + 1) / token_rate.

    Frames finer than tokens are averaged over each token's span (exactly: parts of frames count in part); coarser ones are
    interpolated linearly at its centre. At the ends the nearest frame stands in. -> (B, T, F)"""
    frames = phi.shape[1]
    if rate == token_rate and frames == T and abs(first - 0.5 / rate) < 1e-6:
        return phi
    centre = (torch.arange(T, dtype=torch.float64) + 0.5) / token_rate
    if rate < token_rate:
        x = ((centre - first) * rate).clamp(0, frames - 1)
        a = x.floor().long().clamp(max=max(0, frames - 2))
        b = (a + 1).clamp(max=frames - 1)
        part = (x - a).to(phi)[:, None]
        return phi[:, a] * (1 - part) + phi[:, b] * part
    edges = (torch.arange(frames + 1, dtype=torch.float64) - 0.5) / rate + first  # frame j spans [edges_j, edges_j+1)
    overlap = (torch.minimum(edges[1:], centre[:, None] + 0.5 / token_rate) - torch.maximum(edges[:-1], centre[:, None] - 0.5 / token_rate)).clamp_min(0)
    none = overlap.sum(1) < 1e-9
    overlap[none, (centre[none, None] - (edges[1:] + edges[:-1]) / 2).abs().argmin(1)] = 1.0
    return (overlap / overlap.sum(1, keepdim=True)).to(phi) @ phi


class TeacherFeatures(nn.Module):
    """phi on the codec's latents: z (B, T, C) -> (B, T, F), one feature vector a token, by way of the mel frames or the sound that they
    stand for. Also a codec in the sense of data.LatentCache (key, channels, tokens, encode), so that features are cached as latents are.

    A teacher has takes ("mel" frames or a "wave"), features, rate and first (see align_to_tokens), and is called with what it takes."""

    def __init__(self, codec: nn.Module, teacher: nn.Module):
        super().__init__()
        self.codec, self.teacher, self.channels, self.tokens = copy.deepcopy(codec), teacher, teacher.features, codec.tokens
        key = getattr(teacher, "key", None) or hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())).hexdigest()[:16]
        self.key = f"{codec.key}-phi-{key}"

    def _at_tokens(self, phi: Tensor, T: int) -> Tensor:
        return align_to_tokens(phi, self.teacher.rate, self.teacher.first, self.codec.rate, T)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        heard = self.codec.decode_mel(z.float()) if self.teacher.takes == "mel" else self.codec.decode(z.float())
        return self._at_tokens(self.teacher(heard), z.shape[1])

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> (B, T, F) on the input's device. A teacher of waves hears the recording itself, not what the codec leaves of it."""
        if self.teacher.takes == "mel":
            return self(self.codec.encode(wav).to(self.codec.mean.device)).to(wav.device)
        return self._at_tokens(self.teacher(wav.to(self.codec.mean.device)), self.tokens(wav.shape[-1])).to(wav.device)


def feature_mean(ear: TeacherFeatures, latents, data, device: str) -> Tensor:
    """phi's data-set mean (F,): over twenty minutes of cached latents, or of recordings for a teacher of waves; clips in random order,
    because a folder's first ones may all be of one class."""
    order = np.random.default_rng(0).permutation(len(data))
    some = order[: max(1, int(np.searchsorted(np.cumsum(np.asarray(data.lengths())[order]), 20 * 60 * 16_000)))]
    if ear.teacher.takes == "mel":
        z = np.concatenate([latents.z[latents.where[i] : latents.where[i + 1]] for i in some]).astype(np.float32)
        z = z[np.isfinite(z).all(1)]                               # one broken clip must not spoil every distance
        parts = [ear(torch.from_numpy(part)[None])[0] for part in np.array_split(z, max(1, len(z) // 1_500))]
    else:
        parts = [ear.encode(torch.from_numpy(data.wave(int(i)))[None])[0] for i in some]
    return torch.cat(parts).mean(0).to(device)


def pool(phi: Tensor) -> Tensor:
    """Features of a whole clip: mean, deviation and maximum over time, (B, T, F) -> (B, 3 F)."""
    return torch.cat([phi.mean(1), phi.std(1), phi.amax(1)], -1)


def load_teacher(path: Path = WEIGHTS) -> Teacher:
    """The shipped teacher, frozen, float32, eval mode. FileNotFoundError where the weights are missing."""
    from safetensors.torch import load_file
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: missing; make it with: python guidance.py pretrain")
    teacher = Teacher()
    teacher.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return teacher.eval().requires_grad_(False)


def random_teacher(seed: int) -> Teacher:
    """The same network, not pretrained: the control."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 50_000)
        return Teacher().eval().requires_grad_(False)
