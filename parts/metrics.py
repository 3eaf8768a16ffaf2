"""Metrics: pure functions of arrays, each with its source. No model is trained or loaded here.

Three families. How often a judge detects what a caption asks for (proportions, divergences of probabilities,
distances between clouds of embeddings); how near a restored waveform is to the true one (log-spectral
distance, signal-to-distortion ratio, energy score); and the 95 % intervals that belong to every number.

Conventions: x (N,) is a waveform, float32 in [-1, 1] at 16 kHz; presence and logits are (B, 24), a column
for each sound class; clouds of embeddings are (n, d), a row for each clip. log_power is log10 of power, so
LSD is in decades; high_band_mel is a natural log, so the energy score is in nats.

A small distance is not always good sound: the blurred centre of a distribution has a smaller LSD than a true
draw from it (see lsd), and only the energy score is smallest for the true distribution (see energy_score).

Public: wilson, mean_interval, event_match, bernoulli_kl, kid, frechet, log_power, lsd, si_sdr,
high_band_mel, texture, fine_texture, energy_score, describe, level_above, first_bin, LSD_FFT, LSD_HOP.
"""
from __future__ import annotations

import numpy as np
import scipy.stats
import torch

from parts.audio import RATE
from parts.spectra import log_mel, mel_filters, stft

LSD_FFT, LSD_HOP = 2_048, 512  # samples of an STFT window and of a hop for LSD (NU-Wave2)

# --- intervals ----------------------------------------------------------------------------------------------


def wilson(hits: float, n: int) -> list[float]:
    """95 % Wilson score interval [low, high] of a proportion, `hits` of `n`."""
    interval = scipy.stats.binomtest(int(hits), int(n)).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def mean_interval(x) -> list[float]:
    """95 % Student-t interval [low, high] of a mean over clips, x (n,); NaN for a single clip."""
    x = np.asarray(x, float)
    if len(x) > 1:
        half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    else:
        half = float("nan")
    return [float(x.mean() - half), float(x.mean() + half)]


# --- what a judge detects -----------------------------------------------------------------------------------


def event_match(presence: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Exact match of the *set* of events, (B,) bool: presence (B, 24) in {0, 1}, judge logits (B, 24)
    thresholded at 0."""
    return ((logits > 0) == (presence > 0.5)).all(1)


def bernoulli_kl(p: np.ndarray, q: np.ndarray, eps: float = 1e-4) -> float:
    """Mean over clips and events of KL(Bernoulli(p) || Bernoulli(q)) in nats; p, q (B, 24) probabilities,
    clipped to eps.

    p: the judge on the real clip of a caption, q: on the generated one. The multi-label form of
    audioldm_eval's KL."""
    p = np.clip(p, eps, 1 - eps)
    q = np.clip(q, eps, 1 - eps)
    # KL = p log(p / q) + (1 - p) log((1 - p) / (1 - q))
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


def _cubic_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """k(a, b) = (a.b / d + 1)^3 of all pairs of rows: (n, d), (m, d) -> (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel distance of x (n, d) to the reference y (m, d): unbiased MMD^2 with kernel (x.y / d + 1)^3.
    Source: Binkowski et al. 2018, sec. 4.

    Unbiased means that it can be negative and is 0 on average for equal distributions; a Frechet distance at
    n = 500 is not; NaN where either has one row only. The kernel's 1 supposes features of order one, as
    Inception's are; so both are first divided by the reference's RMS."""
    rms = max(np.sqrt(np.mean(y.astype(np.float64) ** 2)), 1e-12)  # the floor is for a reference of zeros
    x = x.astype(np.float64) / rms
    y = y.astype(np.float64) / rms
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return float("nan")

    kxx = _cubic_kernel(x, x)                                      # (n, n)
    kyy = _cubic_kernel(y, y)                                      # (m, m)
    # MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    within_x = (kxx.sum() - np.trace(kxx)) / (n * (n - 1))
    within_y = (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * _cubic_kernel(x, y).mean())


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to x (n, d) and y (m, d). Source: Heusel et al. 2017, eq. 6.
    ValueError where there are too few clips for a covariance.

    Biased upwards by about d^2 / n: with n = 200 and d = 128 two *equal* distributions are a third of the
    trace apart, so it needs n >= 1000 and d <= 64, or a wider margin; `kid` has no such bias."""
    clips, features = min(len(x), len(y)), x.shape[1]
    if clips <= features:
        raise ValueError(f"{clips} clips can't fit a covariance of {features} features; use kid")
    cx = np.cov(x, rowvar=False)                                   # (d, d)
    cy = np.cov(y, rowvar=False)
    # |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))
    # The trace of a root is the sum of the roots of the eigenvalues.
    trace_of_root = np.sqrt(np.linalg.eigvals(cx @ cy).real.clip(0)).sum()
    means_apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means_apart + np.trace(cx) + np.trace(cy) - 2 * trace_of_root)


# --- how near one waveform is to another --------------------------------------------------------------------


def log_power(x: np.ndarray) -> np.ndarray:
    """log10 power spectrogram for LSD, (N,) -> (frames, 1025): Hann STFT 2048/512, floor 1e-8 (NU-Wave2)."""
    x = np.pad(x, (0, max(0, 2_048 - len(x))))  # shorter than a window: silence follows
    spec = stft(torch.as_tensor(x)[None], LSD_FFT, LSD_HOP)[0]     # (frames, 1025)
    return spec.abs().square().clamp_min(1e-8).log10().numpy()


def first_bin(hz: float) -> int:
    """The bin of log_power from which on frequencies count as above hz."""
    return int((LSD_FFT // 2 + 1) * 2 * hz / RATE)


def _rms_over_bins(squared: np.ndarray) -> float:
    """Mean over frames of the root of the mean over bins, (frames, bins) -> scalar."""
    return float(np.sqrt(squared.mean(1)).mean())


def lsd(ref: np.ndarray, est: np.ndarray, cutoff: float | None = None) -> dict:
    """Log-spectral distance of two log_power arrays: mean over frames of the RMS over bins, in decades of
    power (NU-Wave2). -> {"lsd"}, and with cutoff (Hz) also "lsd_lf", over bins below it, and "lsd_hf", from
    int(1025 * 2 cutoff / rate) up.

    Two draws of one Gaussian spectrum are 0.79 apart, the mean of the log spectrum 0.56 from a draw: smaller
    is not always better sound."""
    squared = (ref - est) ** 2                                     # (frames, 1025)
    if cutoff is None:
        return {"lsd": _rms_over_bins(squared)}
    k = first_bin(cutoff)
    low, high = squared[:, :k], squared[:, k:]
    return {"lsd": _rms_over_bins(squared), "lsd_lf": _rms_over_bins(low), "lsd_hf": _rms_over_bins(high)}


def si_sdr(ref: np.ndarray, est: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of two waveforms (N,) in dB, zero-mean; within [-80, 120].
    Silence would score minus infinity; -80 stands in for it. Source: Le Roux et al. 2019."""
    ref = ref.astype(np.float64) - ref.mean()
    est = est.astype(np.float64) - est.mean()
    # target = <est, ref> / |ref|^2 ref;  SI-SDR = 10 log10(|target|^2 / |est - target|^2)
    target = (est @ ref) / max(ref @ ref, 1e-12) * ref
    if target @ target < 1e-12:
        return -80.0
    ratio = (target @ target) / max(((est - target) ** 2).sum(), 1e-12)
    return float((10 * np.log10(ratio)).clip(-80, 120))


def high_band_mel(x: np.ndarray, cutoff: float) -> np.ndarray:
    """Log-mel bands (of the codec's 64) that lie wholly above cutoff (Hz): (N,) -> (frames, bands), nats."""
    filters = mel_filters()                                        # (513, 64)
    below = torch.linspace(0, RATE / 2, 513) < cutoff
    above = filters[below].sum(0) == 0                             # (64,)
    return log_mel(torch.as_tensor(np.ascontiguousarray(x))[None])[0][:, above].numpy()


def texture(x: np.ndarray) -> np.ndarray:
    """How a clip sounds, whatever its events and their order: (N,) -> (1, 255) statistics in nats, of each of
    the codec's 64 log-mel bands its mean, deviation, and roughness in time (mean size of its change from
    frame to frame), and the roughness in frequency between neighbouring bands.  # ASSUMED

    To be compared by energy_score: nothing is trained on them, so no mechanism has an advantage."""
    mel = log_mel(torch.as_tensor(np.ascontiguousarray(x))[None])[0].numpy()              # (frames, 64)
    in_time, in_frequency = np.abs(np.diff(mel, axis=0)).mean(0), np.abs(np.diff(mel, axis=1)).mean(0)
    return np.concatenate([mel.mean(0), mel.std(0), in_time, in_frequency])[None]


def fine_texture(x: np.ndarray, bands: int = 32) -> np.ndarray:
    """What mel frames can't say: (N,) -> (3, bands) statistics in nats of log power in equal bands of an STFT
    of 2,048 points: crest (by how much the largest bin of a band exceeds its mean), roughness in time and in
    frequency (mean size of the change from frame to frame, from bin to bin).  # ASSUMED

    Crest tells tones from noise, roughness a noise from a smooth spectrum. Frames 60 dB below the loudest
    are left out: what is silent has no texture."""
    power = np.log(10.0) * log_power(x)[:, 1:]                     # (frames, 1024), nats
    loud = power.mean(1)
    heard = loud > loud.max() - 6 * np.log(10)
    power = power.reshape(-1, bands, 1_024 // bands)               # (frames, bands, bins)
    # Changes between neighbours in time that are both there, not across what was left out.
    changes = np.abs(np.diff(power, axis=0))[heard[1:] & heard[:-1]]
    power = power[heard]
    crest = (power.max(2) - power.mean(2)).mean(0)
    in_time = changes.mean((0, 2)) if len(changes) else np.zeros(bands)
    return np.stack([crest, in_time, np.abs(np.diff(power, axis=2)).mean((0, 2))])


def _frame_norm(a: np.ndarray) -> float:
    """Mean over frames of the Euclidean norm over bands, divided by sqrt(bands): (frames, bands) -> nats a
    band."""
    return np.linalg.norm(a, axis=1).mean() / np.sqrt(a.shape[1])


def energy_score(ref: np.ndarray, samples: list[np.ndarray]) -> float:
    """Energy score of samples x_1..x_S of a vector y, by frame: all arrays (frames, bands), see
    high_band_mel. Source: Gneiting & Raftery 2007, eq. 22.

    Proper: its mean is smallest for the true conditional distribution, unlike LSD, which prefers its blurred
    centre. Norms are divided by sqrt(bands) (nats a band); E|x - x'| runs over distinct pairs; one sample (a
    point forecast) has no second term."""
    # E|x - y| - E|x - x'| / 2
    distances = [_frame_norm(sample - ref) for sample in samples]
    spread = [_frame_norm(a - b) for i, a in enumerate(samples) for b in samples[i + 1 :]]
    mean_spread = np.mean(spread) if spread else 0.0
    return float(np.mean(distances) - 0.5 * mean_spread)


def describe(x: np.ndarray) -> dict:
    """What a level meter and a spectrum analyser say of (N,): peak, rms, spectral centroid (centroid_hz,
    power-weighted)."""
    power = np.abs(np.fft.rfft(x)) ** 2
    freqs = np.fft.rfftfreq(len(x), 1 / RATE)
    centroid = (power * freqs).sum() / max(power.sum(), 1e-12)
    return {
        "peak": float(np.abs(x).max()),
        "rms": float(np.sqrt(np.mean(x**2))),
        "centroid_hz": float(centroid),
    }


def level_above(x: np.ndarray, cutoff: float) -> float:
    """Power of (N,) from 500 Hz above the cutoff (Hz) up, relative to that below the cutoff, in dB (at least
    -120)."""
    power = (10 ** log_power(x)).mean(0)                           # (1025,)
    first, last = (first_bin(min(hz, 7_900)) for hz in (cutoff + 500, cutoff))
    return 10 * np.log10((power[first:].sum() / power[:last].sum().clip(1e-12)).clip(1e-12))


def added_above(x: np.ndarray, made: np.ndarray, cutoff: float) -> str:
    """level_above of an input and of what was made of it, in words."""
    before, after = level_above(x, cutoff), level_above(made, cutoff)
    return (f"; power from 500 Hz above it up, relative to that below: {before:.0f} dB in the input, "
            f"{after:.0f} dB now")
