"""TODO"""
from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from einops import rearrange
from torch import Tensor, nn

from parts.audio import RATE

N_FFT, HOP, N_MELS, PER_TOKEN = 1_024, 320, 64, 2
FLOOR = 1e-4  # STFT magnitude under which everything is silence; 80 dB under a full-scale tone's main lobe and more


def stft(wav: Tensor, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """(B, N) -> complex (B, N // hop + 1, n_fft // 2 + 1); Hann window, frame j centred on sample j hop."""
    pad = "reflect" if wav.shape[-1] > n_fft // 2 else "constant"
    return torch.stft(wav, n_fft, hop, window=torch.hann_window(n_fft, device=wav.device), return_complex=True, pad_mode=pad).mT


def istft(spec: Tensor, n: int, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """Inverse of `stft`: complex (B, frames, bins) -> (B, n)."""
    return torch.istft(spec.mT, n_fft, hop, window=torch.hann_window(n_fft, device=spec.device), length=n)


def mel_filters(n_fft: int = N_FFT, n_mels: int = N_MELS) -> Tensor:
    """(bins, n_mels) triangular filters whose columns sum to 1, so that a mel value is a weighted mean STFT magnitude."""
    fb = TAF.melscale_fbanks(n_fft // 2 + 1, 0.0, RATE / 2, n_mels, RATE, norm=None, mel_scale="slaney")
    return fb / fb.sum(0).clamp_min(1e-8)


def log_mel(wav: Tensor, n_fft: int = N_FFT, hop: int = HOP, n_mels: int = N_MELS) -> Tensor:
    """Log-mel magnitude: (B, N) -> (B, N // hop, n_mels), natural log, floored at log FLOOR."""
    return (stft(wav, n_fft, hop)[:, :-1].abs() @ mel_filters(n_fft, n_mels).to(wav)).clamp_min(FLOOR).log()


def griffin_lim(mag: Tensor, n: int, iters: int = 32, momentum: float = 0.99, low: Tensor | None = None, keep: Tensor | None = None,
                generator: torch.Generator | None = None) -> Tensor:
    """Waveform (B, n) whose STFT magnitude is near mag (B, frames, bins).  # Fast Griffin-Lim: Perraudin et al. 2013, alg. 2

    All rows start from the same random phases, so a clip sounds the same whatever batch it is decoded in.

    With `low` (complex STFT of a known signal) and `keep` (bins,) True where it is known, those bins are reset to their known
    complex values in each iteration, so the invented band grows phases that agree with the recorded one."""
    phase = 2 * torch.pi * torch.rand(mag.shape[1:], generator=generator).to(mag.device)
    spec, last = torch.polar(mag, phase.expand_as(mag)), torch.zeros(())
    for _ in range(iters):
        if low is not None:
            spec = torch.where(keep, low, spec)
        new = stft(istft(spec, n))
        step = torch.lerp(last, new, 1 + momentum) if last.ndim else new.clone()  # new + momentum (new - last)
        spec, last = step.mul_(mag / step.abs().clamp_min(1e-9)), new  # in place: these passes over memory are most of the time
    if low is not None:
        spec = torch.where(keep, low, spec)
    return istft(spec, n)


class PCA(nn.Module):
    """The linear half of a codec: frames (..., d) <-> channels (..., C), as buffers; fitted by `fit_rows`, never trained.

    Channel scale: std^whiten is divided out, then one global scale gives mean variance 1. ASSUMED: whiten = 0.5. With 1 every
    component is equally loud and the loss spends most of itself on inaudible ones; with 0 the small ones drown in noise."""

    def __init__(self, d: int, channels: int, whiten: float = 0.5):
        super().__init__()
        self.channels, self.whiten = channels, whiten
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("basis", torch.eye(d)[:, :channels].contiguous())
        self.register_buffer("scale", torch.ones(channels))

    def fingerprint(self, *what) -> str:
        """Of the fitted buffers and whatever else the latent space depends on."""
        h = hashlib.sha256(",".join(map(str, what)).encode())
        for b in (self.mean, self.basis, self.scale):
            h.update(b.cpu().numpy().tobytes())
        return h.hexdigest()[:16]

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """Principal components of x (n, d); sets `explained`, the share of variance that they hold."""
        if len(x) <= self.channels:
            raise ValueError(f"{len(x)} tokens can't fit {self.channels} principal components")
        x = x.double().cpu()
        self.mean.copy_(x.mean(0))
        var, vec = torch.linalg.eigh(torch.cov(x.T))
        order = torch.argsort(var, descending=True)[: self.channels]
        self.explained = float(var[order].sum() / var.sum())
        vec = vec[:, order]
        vec = vec * torch.sign(vec[vec.abs().argmax(0), torch.arange(self.channels)])  # eigenvectors have no sign of their own
        std = var[order].clamp_min(1e-6 * float(var.max())).sqrt()  # constant features must not be blown up to unit variance
        self.basis.copy_(vec)
        scale = std**self.whiten
        self.scale.copy_(scale * ((std / scale) ** 2).mean().sqrt())

    def project(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.basis / self.scale

    def restore(self, z: Tensor) -> Tensor:
        return (z * self.scale) @ self.basis.T + self.mean


class Codec(PCA):
    """Log-mel frames, two a token, projected on `channels` principal components."""
    rate, spreads = RATE / (PER_TOKEN * HOP), True                 # tokens a second; small enough to be sent to worker processes

    def __init__(self, channels: int = 64, whiten: float = 0.5):
        super().__init__(PER_TOKEN * N_MELS, channels, whiten)

    @property
    def key(self) -> str:
        """Changes when the latent space changes: part of the name of a latent cache. Raise the leading 1 with the code."""
        return self.fingerprint(1, N_FFT, HOP, N_MELS, FLOOR)

    def tokens(self, n: int) -> int:
        """Tokens of n samples (the last one may be padded)."""
        return max(1, -(-int(n) // (PER_TOKEN * HOP)))

    def _frames(self, wav: Tensor) -> Tensor:
        wav = F.pad(wav, (0, self.tokens(wav.shape[-1]) * PER_TOKEN * HOP - wav.shape[-1]))
        return rearrange(log_mel(wav), "b (t p) m -> b t (p m)", p=PER_TOKEN)  # (B, T, 128)

    def fit(self, waves) -> Codec:
        """PCA of the mel frames of an iterable of waveforms (N,)."""
        self.fit_rows(torch.cat([self._frames(torch.as_tensor(w)[None])[0] for w in waves]))
        return self

    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> z (B, T, C), N is padded with silence to whole tokens."""
        return self.project(self._frames(wav))

    def decode_mel(self, z: Tensor) -> Tensor:
        """z (B, T, C) -> log-mel (B, 2 T, 64)."""
        return rearrange(self.restore(z), "b t (p m) -> b (t p) m", p=PER_TOKEN).clamp(np.log(FLOOR), 7.0)

    def magnitude(self, mel: Tensor) -> Tensor:
        """Log-mel (B, F, 64) -> non-negative STFT magnitude (B, F, 513): multiplicative updates for min |S fb - mel|, S >= 0."""
        fb, m = mel_filters().to(mel), mel.exp()
        s = m @ (fb / fb.sum(1, keepdim=True).clamp_min(1e-8)).T  # (B, F, 513): interpolate between band centres
        gram = fb @ fb.T
        for _ in range(12):
            s = s * (m @ fb.T) / (s @ gram).clamp_min(1e-12)
        return s

    @torch.no_grad()
    def decode(self, z: Tensor, muffled: Tensor | None = None, cutoff: float | Tensor | None = None, seed: int = 0, iters: int = 32) -> Tensor:
        """z (B, T, C) -> wav (B, 640 T). With muffled (B, N <= 640 T) and cutoff (Hz), the band under the cutoff is the
        recording's own, level included, and only the band above is invented; without, peaks over 0.95 are scaled down to it
        (guidance exaggerates levels too, and clipped samples crackle up to 8 kHz)."""
        mag = self.magnitude(self.decode_mel(z))
        mag = torch.cat([mag, mag[:, -1:]], 1)  # the frame centred on the very end
        n, low, keep = z.shape[1] * PER_TOKEN * HOP, None, None
        if muffled is not None:
            low = stft(F.pad(muffled, (0, n - muffled.shape[-1])))
            freqs = torch.linspace(0, RATE / 2, N_FFT // 2 + 1, device=z.device)
            # A low-pass is already falling near its cutoff: the last 4 % are the model's, at least as loud as the input there.
            keep = freqs < 0.96 * cutoff
            mag = torch.where(freqs < cutoff, torch.maximum(mag, low.abs()), mag)
        y = griffin_lim(mag, n, iters, low=low, keep=keep, generator=torch.Generator().manual_seed(seed))
        return y if low is not None else limit_peak(y)


def limit_peak(y: Tensor) -> Tensor:
    """Scale the clips of (B, N) whose peak is over 0.95 down to it."""
    return y * (0.95 / y.abs().amax(1, keepdim=True).clamp_min(1e-9)).clamp_max(1)


def keep_low_band(y: Tensor, muffled: Tensor, cutoff: float) -> Tensor:
    """y (B, N) with everything under cutoff (Hz) replaced by that of muffled (B, <= N), level included."""
    low, freqs = stft(F.pad(muffled, (0, y.shape[-1] - muffled.shape[-1]))), torch.linspace(0, RATE / 2, N_FFT // 2 + 1, device=y.device)
    return istft(torch.where(freqs < 0.96 * cutoff, low, stft(y)), y.shape[-1])
