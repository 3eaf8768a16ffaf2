"""The embedded codec: log-mel frames and their principal components; decoding by a small network.

Idea.  A latent space that is fitted in seconds and can be read: the best *linear* autoencoder of log-mel
frames. Two frames make a token, PCA leaves C numbers of each, and the inverse is a matrix product and a
vocoder (parts/decoder.py).

    wav (B, N) --log_mel--> (B, F, 64) --two frames a token, PCA--> z (B, T, C)          N = 640 T, F = 2 T
    z (B, T, C) --decode_mel--> (B, F, 64) --Decoder--> wav (B, N)

Waveforms are float32 in [-1, 1] at 16 kHz; 50 frames and 25 tokens a second. `key` names the latent space:
caches of latents are stored under it.

B batch, N samples, F frames, T tokens, C latent channels, 64 mel bands, 513 STFT bins.

Public: PER_TOKEN, PCA, Codec, limit_peak, keep_low_band.
"""
from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from parts.audio import RATE
from parts.decoder import load_decoder
from parts.errors import UserError
from parts.spectra import FLOOR, HOP, N_FFT, N_MELS, istft, log_mel, stft

PER_TOKEN = 2  # frames of a token

# --- latent spaces --------------------------------------------------------------------------------------


class PCA(nn.Module):
    """The linear half of a codec: frames (..., d) <-> channels (..., C), as buffers; fitted by `fit_rows`,
    never trained.

    Channel scale: std^whiten is divided out, then one global scale gives mean variance 1. ASSUMED: whiten =
    0.5. With 1 every component is equally loud and the loss spends most of itself on inaudible ones; with 0
    the small ones drown in noise."""

    def __init__(self, d: int, channels: int, whiten: float = 0.5):
        super().__init__()
        self.channels = channels
        self.whiten = whiten
        self.explained = float("nan")  # share of the variance that the channels hold; known once fitted
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("basis", torch.eye(d)[:, :channels].contiguous())
        self.register_buffer("scale", torch.ones(channels))

    def fingerprint(self, *what) -> str:
        """Of the fitted buffers and whatever else the latent space depends on: 16 hexadecimal digits."""
        sha = hashlib.sha256(",".join(map(str, what)).encode())
        for buffer in (self.mean, self.basis, self.scale):
            sha.update(buffer.cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """Principal components of x (n, d); sets `explained`, the share of variance that they hold.
        UserError where n is no more than the number of channels, or all rows are the same."""
        if len(x) <= self.channels:
            raise UserError(f"{len(x)} tokens of sound can't fit {self.channels} principal components; give "
                            "more sound, or fewer --channels")
        if bool((x == x[0]).all()):
            raise UserError("all of the sound that the codec is fitted on is silence, or one and the same; "
                            "give other sound")

        # The directions of largest variance, in double precision.
        x = x.double().cpu()
        var, vec = torch.linalg.eigh(torch.cov(x.T))               # (d,), (d, d)
        order = torch.argsort(var, descending=True)[: self.channels]
        vec = vec[:, order]                                        # (d, C)
        # Eigenvectors have no sign of their own: the largest entry becomes positive.
        vec = vec * torch.sign(vec[vec.abs().argmax(0), torch.arange(self.channels)])

        # Constant features must not be blown up to unit variance.
        std = var[order].clamp_min(1e-6 * float(var.max())).sqrt()
        scale = std**self.whiten
        scale = scale * ((std / scale) ** 2).mean().sqrt()         # mean variance 1

        self.explained = float(var[order].sum() / var.sum())
        self.mean.copy_(x.mean(0))
        self.basis.copy_(vec)
        self.scale.copy_(scale)

    def project(self, x: Tensor) -> Tensor:
        """Frames (..., d) -> channels (..., C)."""
        return (x - self.mean) @ self.basis / self.scale

    def restore(self, z: Tensor) -> Tensor:
        """Channels (..., C) -> frames (..., d)."""
        return (z * self.scale) @ self.basis.T + self.mean


class Codec(PCA):
    """Log-mel frames, two a token, projected on `channels` principal components."""

    rate = RATE / (PER_TOKEN * HOP)  # tokens a second
    spreads = True                   # small enough to be sent to worker processes

    def __init__(self, channels: int = 64, whiten: float = 0.5):
        super().__init__(PER_TOKEN * N_MELS, channels, whiten)

    @property
    def key(self) -> str:
        """Changes when the latent space changes: part of the name of a latent cache. Raise the leading 1 with
        the code."""
        return self.fingerprint(1, N_FFT, HOP, N_MELS, FLOOR)

    def tokens(self, n: int) -> int:
        """Tokens of n samples (the last one may be padded)."""
        return max(1, -(-int(n) // (PER_TOKEN * HOP)))

    def _frames(self, wav: Tensor) -> Tensor:
        """(B, N) -> the rows that are projected, (B, T, 128)."""
        whole = self.tokens(wav.shape[-1]) * PER_TOKEN * HOP
        mel = log_mel(F.pad(wav, (0, whole - wav.shape[-1])))      # (B, 2 T, 64)
        return rearrange(mel, "b (t p) m -> b t (p m)", p=PER_TOKEN)

    def fit(self, waves) -> Codec:
        """PCA of the mel frames of an iterable of waveforms (N,)."""
        self.fit_rows(torch.cat([self._frames(torch.as_tensor(wave)[None])[0] for wave in waves]))
        return self

    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> z (B, T, C) on the input's device; N is padded with silence to whole tokens."""
        return self.project(self._frames(wav.to(self.mean.device))).to(wav.device)

    def decode_mel(self, z: Tensor) -> Tensor:
        """z (B, T, C) -> log-mel (B, 2 T, 64)."""
        mel = rearrange(self.restore(z), "b t (p m) -> b (t p) m", p=PER_TOKEN)
        return mel.clamp(np.log(FLOOR), 7.0)

    @torch.no_grad()
    def decode(self, z: Tensor, muffled: Tensor | None = None, cutoff: float | None = None,
               seeds: list[int] | None = None) -> Tensor:
        """z (B, T, C) -> wav (B, 640 T) on the input's device.

        With muffled (B, N <= 640 T) and cutoff (Hz), the band under the cutoff is the recording's own, level
        included, and only the band above comes from z; without, peaks over 0.95 are scaled down to it
        (guidance exaggerates levels too, and clipped samples crackle up to 8 kHz). seeds: of the decoder's
        noise, one a clip; None: 0 for all."""
        mel = self.decode_mel(z.to(self.mean.device))
        decoder, seeds = load_decoder(str(mel.device)), seeds or [0] * len(z)
        if muffled is None:
            return limit_peak(decoder.decode(mel, seeds)).to(z.device)
        low = _padded_stft(muffled.to(mel.device), mel.shape[1] * HOP)             # (B, 2 T + 1, 513)
        return decoder.decode(mel, seeds, low=low, keep=_known_bins(cutoff, mel.device)).to(z.device)


# --- levels and bands -----------------------------------------------------------------------------------


def limit_peak(y: Tensor) -> Tensor:
    """Scale the clips of (B, N) whose peak is over 0.95 down to it."""
    return y * (0.95 / y.abs().amax(1, keepdim=True).clamp_min(1e-9)).clamp_max(1)


def keep_low_band(y: Tensor, muffled: Tensor, cutoff: float) -> Tensor:
    """y (B, N) with everything under cutoff (Hz) replaced by that of muffled (B, <= N), level included."""
    n = y.shape[-1]
    low = _padded_stft(muffled, n)                                 # (B, N // 320 + 1, 513)
    return istft(torch.where(_known_bins(cutoff, y.device), low, stft(y)), n)


def _padded_stft(wav: Tensor, n: int) -> Tensor:
    """The STFT of (B, <= n), continued by silence to n samples."""
    return stft(F.pad(wav, (0, n - wav.shape[-1])))


def _known_bins(cutoff: float, device) -> Tensor:
    """(513,) True at the bins that a recording with this cutoff (Hz) still holds. A low-pass is already
    falling near its cutoff: the last 4 % are the model's.  # ASSUMED: 4 %"""
    frequencies = torch.linspace(0, RATE / 2, N_FFT // 2 + 1, device=device)   # Hz
    return frequencies < 0.96 * cutoff
