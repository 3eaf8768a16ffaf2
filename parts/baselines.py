"""Baselines of super-resolution, fitted on training clips. They predict what the metric measures.

A restorer that only guesses the level of the missing band already improves the log-spectral distance. These
two say by how much, so that a model's row can be read as what it adds. They predict the log10 power spectrum
above the cutoff, frame by frame (STFT 2048/512 as in parts/metrics.py):

    mean     every frame gets the training set's mean high-band log spectrum
    ridge    ridge regression from a frame's low-band to its high-band log spectrum; the penalty is chosen on
             the last tenth of the frames

and render it as Gaussian noise of that spectrum over the input's own low band.

Waveforms are (N,) float32 at 16 kHz, cutoffs in Hz, spectra (frames, 1025) split at bin `cut`.

Public: SpectrumBaseline.
"""
from __future__ import annotations

import numpy as np
import torch

from parts.band_limit import band_limit
from parts.metrics import LSD_FFT, LSD_HOP, first_bin, log_power
from parts.spectra import istft, stft

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Weights (d, k) of ridge regression of centred x (n, d), y (n, k)."""
    # (X'X + penalty n I) W = X'Y
    return np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ y)


def _spectrum(x: np.ndarray) -> torch.Tensor:
    """(N,) -> complex (frames, 1025), as log_power has it."""
    return stft(torch.as_tensor(np.ascontiguousarray(x))[None], LSD_FFT, LSD_HOP)[0]


class SpectrumBaseline:
    """Both baselines for one cutoff, fitted on an iterable of full-band waves (N,). Fitted values: mean_low
    (cut,), mean_high (1025 - cut,), weights (cut, 1025 - cut), penalty."""

    def __init__(self, waves, cutoff: int):
        self.cut = first_bin(cutoff)
        low, high = [], []
        for x in waves:
            low.append(log_power(band_limit(x, cutoff))[:, : self.cut])
            high.append(log_power(x)[:, self.cut :])
        x = np.concatenate(low).astype(np.float64)                 # (frames, cut)
        y = np.concatenate(high).astype(np.float64)                # (frames, 1025 - cut)
        self.mean_low, self.mean_high = x.mean(0), y.mean(0)
        x, y = x - self.mean_low, y - self.mean_high

        # The penalty is chosen on the frames of the last clips, not on neighbours of fitted frames.
        held_out = np.arange(len(x)) >= 0.9 * len(x)
        errors = {}
        for penalty in PENALTIES:
            weights = _ridge(x[~held_out], y[~held_out], penalty)
            errors[penalty] = np.mean((x[held_out] @ weights - y[held_out]) ** 2)
        self.penalty = min(errors, key=errors.get)
        self.weights = _ridge(x, y, self.penalty)

    def predict(self, muffled: np.ndarray, kind: str) -> np.ndarray:
        """Predicted mean of the high band's log10 power: (N,) -> (frames, 1025 - cut). kind: `mean` or
        `ridge`."""
        low = log_power(muffled)[:, : self.cut]
        if kind == "mean":
            return np.broadcast_to(self.mean_high, (len(low), len(self.mean_high)))
        return (low - self.mean_low) @ self.weights + self.mean_high

    def render(self, muffled: np.ndarray, kind: str, seed: int) -> np.ndarray:
        """Muffled (N,) -> restored (N,): noise from `seed` in the shape of the predicted spectrum over the
        input's low band."""
        n = len(muffled)
        white = _spectrum(np.random.default_rng(seed).standard_normal(n).astype(np.float32))
        window = torch.hann_window(LSD_FFT)
        white = white / np.sqrt(float(window.square().sum()))      # mean power 1 in each bin
        restored = _spectrum(muffled)                              # (frames, 1025)
        # E log(power) = log E(power) - Euler's gamma, as power is exponential; so that much is added.
        power = 10 ** self.predict(muffled, kind) * np.exp(np.euler_gamma)  # (frames, 1025 - cut)
        amplitude = torch.as_tensor(np.sqrt(power), dtype=torch.float32)
        restored[:, self.cut :] = white[:, self.cut :] * amplitude
        return istft(restored[None], n, LSD_FFT, LSD_HOP)[0].numpy()
