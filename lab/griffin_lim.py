"""Decoding without a network, what parts/decoder.py is compared with: a smooth spectrum, random phases.

    log-mel (B, F, 64) --magnitude--> (B, F, 513), not negative --decoder.griffin_lim--> wav (B, 320 F)

B batch, F frames, 64 mel bands, 513 STFT bins.

Public: magnitude, decode_by_griffin_lim.
"""
from __future__ import annotations

import torch
from torch import Tensor

from parts.codec import Codec, limit_peak
from parts.decoder import griffin_lim
from parts.spectra import HOP, mel_filters, mel_spread


def magnitude(mel: Tensor) -> Tensor:
    """Log-mel (B, F, 64) -> STFT magnitude S (B, F, 513), not negative."""
    # min |S fb - m|, S >= 0, by multiplicative updates S <- S (m fb') / (S fb fb')
    fb = mel_filters().to(mel)                                 # (513, 64)
    m = mel.exp()
    s = m @ mel_spread(fb).T                                   # (B, F, 513): between band centres
    gram = fb @ fb.T                                           # (513, 513)
    for _ in range(12):
        s = s * (m @ fb.T) / (s @ gram).clamp_min(1e-12)
    return s


@torch.no_grad()
def decode_by_griffin_lim(codec: Codec, z: Tensor) -> Tensor:
    """Latents z (B, T, C) -> wav (B, 640 T), as Codec.decode; 32 rounds from the same random phases."""
    mag = magnitude(codec.decode_mel(z))
    mag = torch.cat([mag, mag[:, -1:]], 1)                         # the frame centred on the very end
    phase = 2 * torch.pi * torch.rand(mag.shape[1:], generator=torch.Generator().manual_seed(0))
    spec = torch.polar(mag, phase.to(mag.device).expand_as(mag))
    return limit_peak(griffin_lim(spec, (mag.shape[1] - 1) * HOP, 32))
