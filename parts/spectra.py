"""Spectra: the STFT, its inverse, and log-mel frames, which all parts that analyse sound share.

    wav (B, N) --stft--> complex (B, N / 320 + 1, 513) --istft--> wav (B, N)
    wav (B, N) --log_mel--> (B, N / 320, 64), natural log, floored

Waveforms are float32 in [-1, 1] at 16 kHz. B batch, N samples, 513 STFT bins, 64 mel bands.

Public: N_FFT, HOP, N_MELS, FLOOR, stft, istft, mel_filters, mel_spread, log_mel.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from torch import Tensor

from parts.audio import RATE

N_FFT = 1_024  # samples of an STFT window
HOP = 320      # samples from one frame to the next
N_MELS = 64    # mel bands
# STFT magnitude that counts as silence: 128 dB below the peak of a full-scale sine (256).
FLOOR = 1e-4
LONG = 60      # s; what is longer is done block by block


def stft(wav: Tensor, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """(B, N) -> complex (B, N // hop + 1, n_fft // 2 + 1); Hann window, frame j centred on sample j hop."""
    window = torch.hann_window(n_fft, device=wav.device)
    # A clip shorter than half a window can't be reflected.
    pad = "reflect" if wav.shape[-1] > n_fft // 2 else "constant"
    return torch.stft(wav, n_fft, hop, window=window, return_complex=True, pad_mode=pad).mT


def istft(spec: Tensor, n: int, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """Inverse of `stft`: complex (B, frames, bins) -> (B, n)."""
    window = torch.hann_window(n_fft, device=spec.device)
    return torch.istft(spec.mT, n_fft, hop, window=window, length=n)


def mel_filters(n_fft: int = N_FFT, n_mels: int = N_MELS) -> Tensor:
    """(bins, n_mels) triangular filters whose columns sum to 1, so that a mel value is a weighted mean STFT
    magnitude."""
    filters = TAF.melscale_fbanks(n_fft // 2 + 1, 0.0, RATE / 2, n_mels, RATE, norm=None, mel_scale="slaney")
    return filters / filters.sum(0).clamp_min(1e-8)


def mel_spread(filters: Tensor) -> Tensor:
    """Weights (bins, n_mels) of mel_filters that carry values of bands to the bins between their centres."""
    return filters / filters.sum(1, keepdim=True).clamp_min(1e-8)


def log_mel(wav: Tensor, n_fft: int = N_FFT, hop: int = HOP, n_mels: int = N_MELS) -> Tensor:
    """Log-mel magnitude: (B, N) -> (B, N // hop, n_mels), natural log, floored at log FLOOR."""
    filters, frames, block = mel_filters(n_fft, n_mels).to(wav), wav.shape[-1] // hop, LONG * RATE // hop
    if frames <= block:
        magnitude = stft(wav, n_fft, hop)[:, :-1].abs()            # (B, N // hop, bins)
        return (magnitude @ filters).clamp_min(FLOOR).log()        # (B, N // hop, n_mels)

    # The same frames, block by block: the spectrum of an hour takes gigabytes.
    padded, window = F.pad(wav, (n_fft // 2, n_fft // 2), mode="reflect"), torch.hann_window(n_fft).to(wav)
    blocks = []
    for first in range(0, frames, block):
        last = min(first + block, frames) - 1
        part = padded[:, first * hop : last * hop + n_fft]
        spec = torch.stft(part, n_fft, hop, window=window, center=False, return_complex=True)
        blocks.append((spec.mT.abs() @ filters).clamp_min(FLOOR).log())
    return torch.cat(blocks, 1)
