"""Decoder of the embedded codec: log-mel frames to a waveform, by a small network and a search for phases.

Idea.  64 mel bands leave the spectrum between them open, and its phases. A network writes magnitudes, as the
sum of tones and of noise, each with its own part; phases need no learning:

    log-mel (B, F, 64) --ConvNeXt--> h (B, F, W) --head--> a, b (B, F, 513)
    spectrum = S0 exp(a + i phase)  +  S0 exp(b) N       S0: the mel spectrum, interpolated
               tones, impulses         noise, shaped
    spectrum --rounds of Griffin-Lim: its magnitudes stay, its phases come to agree--> wav (B, 320 F)

N is the STFT of white noise: a noise has a random spectrum however well its mel is known, and no network need
learn to draw one. The phase of a tone advances from frame to frame by its frequency, which is where its
magnitudes have their centre. Sources: networks that write an STFT, Vocos (arXiv 2306.00814); phases from
peaks, SPSI (Beauregard et al. 2015); fast Griffin-Lim (Perraudin et al. 2013). Noise beside tones, and the
local centre in place of peaks: ASSUMED. How it is trained: lab/train_decoder.py.

B batch, F frames (50 a second), W width, 64 mel bands, 513 STFT bins.

Public: Decoder, griffin_lim, unit_noise, WEIGHTS, load_decoder.
"""
from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from parts.checkpoints import load_frozen
from parts.spectra import FLOOR, HOP, N_FFT, N_MELS, istft, mel_filters, mel_spread, stft

WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "decoder.safetensors"
BINS = N_FFT // 2 + 1
ROUNDS = 4  # of Griffin-Lim: steady tones agree by then


# --- the network ----------------------------------------------------------------------------------------

class _Block(nn.Module):
    """ConvNeXt block over time: h (B, F, W) -> (B, F, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.near = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(self.near(h.mT).mT))


class Decoder(nn.Module):
    """log-mel (B, F, 64) -> magnitude of the tones and gain of the noise, (B, F, 513) each."""

    def __init__(self, width: int = 192, depth: int = 5):
        super().__init__()
        self.embed = nn.Conv1d(N_MELS, width, 7, padding=3)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * BINS)
        # At first all is noise of the right colour, and tones 9 dB below it.
        nn.init.normal_(self.head.weight, std=1e-2)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[:BINS] = -1.0
        filters = mel_filters()                                    # (513, 64)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("spread", mel_spread(filters), persistent=False)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.embed(((mel + 4) / 2.5).mT).mT)         # (B, F, W)
        for block in self.blocks:
            h = block(h)
        a, b = rearrange(self.head(self.last(h)).float(), "b f (n k) -> n b f k", n=2)
        # S0: mel magnitude between the centres of bands. The gains are bounded, as a guard: e^4 is 35 dB.
        base = (mel.exp() - FLOOR).clamp_min(1e-3 * FLOOR) @ self.spread.T
        return base * a.clamp(-12, 4).exp(), base * b.clamp(-12, 4).exp()

    def fit(self, spec: Tensor, mel: Tensor, rounds: int = 2) -> Tensor:
        """Complex (B, F, 513), scaled so that its log-mel is about mel (B, F, 64): whatever noise was drawn,
        this is what the clip had."""
        for _ in range(rounds):
            now = (spec.abs() @ self.filters).clamp_min(FLOOR)
            spec = spec * ((mel.exp() / now) @ self.spread.T)
        return spec

    @torch.no_grad()
    def decode(self, mel: Tensor, seeds: list[int], low: Tensor | None = None,
               keep: Tensor | None = None) -> Tensor:
        """log-mel (B, F, 64) -> (B, 320 F). The noise of row j is made of seeds[j] alone, so a clip sounds
        the same whatever batch it is decoded in. low, keep: see griffin_lim."""
        n = mel.shape[1] * HOP
        noise = np.stack([np.random.default_rng([seed, 7]).standard_normal(n, np.float32) for seed in seeds])
        mel = torch.cat([mel, mel[:, -1:]], 1)                     # and the frame centred on the very end
        tones, gain = self(mel)
        # spectrum = tones e^(i phase) + gain x unit noise
        spec = torch.polar(tones, phases(tones)) + gain * unit_noise(torch.from_numpy(noise).to(mel.device))
        return griffin_lim(self.fit(spec, mel), n, ROUNDS, low, keep)


def unit_noise(white: Tensor) -> Tensor:
    """White noise of unit variance (B, N) -> its STFT (B, N // 320 + 1, 513), of unit mean power."""
    # A Hann window's squares sum to 3 / 8 of its length.
    return stft(white) * (0.375 * N_FFT) ** -0.5


# --- phases ---------------------------------------------------------------------------------------------

def phases(magnitude: Tensor) -> Tensor:
    """(B, F, 513) -> phases (B, F, 513) of tones at the local centres of magnitude."""
    bins = torch.arange(BINS, device=magnitude.device, dtype=magnitude.dtype)
    power = magnitude.square()

    def around(x: Tensor) -> Tensor:                               # sum over five bins
        return 5 * F.avg_pool1d(x, 5, 1, 2)
    centre = around(bins * power) / around(power).clamp_min(1e-20)           # in bins
    # Each frame is omega hop on from the one before; frames are centred, so neighbouring bins differ by pi.
    # Whole turns are dropped first: summed up, they would take float32's digits in a long clip.
    advance = (2 * torch.pi * HOP / N_FFT * centre).remainder(2 * torch.pi)
    return torch.pi * bins + advance.cumsum(1)


def griffin_lim(spec: Tensor, n: int, rounds: int, low: Tensor | None = None, keep: Tensor | None = None,
                momentum: float = 0.99) -> Tensor:
    """Waveform (B, n) whose STFT has about the magnitudes of spec, complex (B, frames, 513), and phases that
    begin as its own and come to agree.

    With `low` (complex STFT of a known signal) and `keep` (513,) True where it is known, those bins are
    reset to their known complex values in each round, so that the phases of the others agree with them."""
    mag, last = spec.abs(), None
    for _ in range(rounds):
        if low is not None:
            spec = torch.where(keep, low, spec)
        # Fast Griffin-Lim: Perraudin et al. 2013, alg. 2
        #   new  = the nearest spectrum that a waveform has
        #   step = new + momentum (new - last)
        #   spec = mag step / |step|
        new = stft(istft(spec, n))
        step = new.clone() if last is None else torch.lerp(last, new, 1 + momentum)
        last = new
        # In place: these passes over memory are most of the time.
        spec = step.mul_(mag / step.abs().clamp_min(1e-9))
    if low is not None:
        spec = torch.where(keep, low, spec)
    return istft(spec, n)


@functools.cache
def load_decoder(device: str = "cpu") -> Decoder:
    """The shipped decoder on a device, frozen."""
    return load_frozen(Decoder(), WEIGHTS).to(device)
