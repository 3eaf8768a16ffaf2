"""Band-limiting: how recordings lose their treble, and how to measure where.

Super-resolution learns from pairs that it makes itself: a full-band clip, and the same clip as a recording of
low rate would hold it. `band_limit` makes the second from the first, `random_band_limit` with a filter drawn
at random, so that the model does not learn to undo one filter alone. `find_cutoff` measures the band limit of
a recording from elsewhere.

    x (N,) float at 16 kHz --band_limit(cutoff Hz, family, order)--> (N,) float32, nothing above the cutoff
    x (N,) --find_cutoff--> cutoff in Hz, or None where the sound reaches to the top

Public: BAND_LIMIT_VERSION, FILTERS, band_limit, random_band_limit, find_cutoff.
"""
from __future__ import annotations

import numpy as np
import scipy.signal
from einops import rearrange

from parts.audio import RATE
from parts.metrics import log_power

BAND_LIMIT_VERSION = 1  # raise when the law below changes: cached conditions are keyed by it
FILTERS = ("cheby1", "butter", "bessel", "ellip")  # the four families of NVSR and AudioLBM


def _low_pass(family: str, order: int, relative: float) -> np.ndarray:
    """Second-order sections of a filter of FILTERS, (sections, 6). relative: its cutoff as a share of 8 kHz.
    Source: NU-Wave2 (cheby1, 0.05 dB ripple), NVSR's other families (ellip: 0.1 dB ripple, 60 dB stop band).
    """
    if family == "cheby1":
        return scipy.signal.cheby1(order, 0.05, relative, output="sos")
    if family == "butter":
        return scipy.signal.butter(order, relative, output="sos")
    if family == "bessel":
        return scipy.signal.bessel(order, relative, norm="mag", output="sos")
    if family == "ellip":
        return scipy.signal.ellip(order, 0.1, 60, relative, output="sos")
    raise ValueError(f"filter {family!r}: not one of {', '.join(FILTERS)}")


def band_limit(x: np.ndarray, cutoff: int, family: str = "cheby1", order: int = 8) -> np.ndarray:
    """Low-pass (zero phase, scipy) at `cutoff` Hz, then resample to 2 cutoff and back: what a low-rate
    recording keeps.

    x (N,) -> (N,) float32. cutoff must divide evenly enough: use multiples of 250 Hz below 8 kHz; ValueError
    where it is not below 8 kHz. Source: NU-Wave2, NVSR (see _low_pass)."""
    if not 0 < cutoff < RATE / 2:
        raise ValueError(f"cutoff {cutoff} Hz must lie between 0 and {RATE / 2:.0f} Hz")
    sections = _low_pass(family, order, cutoff / (RATE / 2))

    # Forwards and backwards: zero phase, and the filter's gain squared. A clip shorter than scipy's padding
    # gets less of it.
    padding = min(len(x) - 1, 3 * (2 * len(sections) + 1))
    y = scipy.signal.sosfiltfilt(sections, np.asarray(x, np.float64), padlen=padding)

    # To a rate of 2 cutoff and back.
    divisor = np.gcd(2 * int(cutoff), RATE)
    up, down = 2 * int(cutoff) // divisor, RATE // divisor
    low_rate = scipy.signal.resample_poly(y, up, down)
    y = scipy.signal.resample_poly(low_rate, down, up)
    return np.pad(y, (0, max(0, len(x) - len(y))))[: len(x)].astype(np.float32)


def random_band_limit(x: np.ndarray, rng) -> tuple[np.ndarray, int]:
    """band_limit with random family, order 2..10 and log-uniform cutoff 1..6 kHz (250 Hz grid) ->
    (muffled (N,), cutoff)."""
    exact = np.exp(rng.uniform(np.log(1_000), np.log(6_000)))
    cutoff = int(round(exact / 250) * 250)
    family = str(rng.choice(FILTERS))
    order = int(rng.integers(2, 11))
    return band_limit(x, cutoff, family, order), cutoff


def find_cutoff(x: np.ndarray) -> float | None:
    """Frequency (Hz, 125 Hz grid, to about 500 Hz) above which a recording holds nothing, or None if it is
    full-band.

    The *noise floor* is searched for an edge, not the sound: a bell has no treble, but its recording's hiss
    goes on to the top; a low-pass takes the hiss too. Floor: 15 % quantile over time and bins of each 125 Hz
    band, in frames within 40 dB of the loudest. Edge: everything 625 Hz above it lies 18 dB under all of the
    750 Hz below it. ASSUMED: these thresholds; measured by a test."""
    # The noise floor of each band, in the frames in which something sounds.
    power = 10 * log_power(x)                                      # dB (frames, 1025)
    level = np.log10((10 ** (power / 10)).sum(1))                  # (frames,)
    power = power[level >= level.max() - 4]
    bands = rearrange(power[:, :1_024], "frames (bands bins) -> bands (frames bins)", bands=64)
    floor = np.quantile(bands, 0.15, axis=1)                       # dB (64,), 125 Hz each

    # The edge is where the floor drops most: from the quietest of the six bands below it to the loudest of
    # all that lie five bands and more above it.
    drop = {edge: floor[edge - 6 : edge].min() - floor[edge + 5 :].max() for edge in range(6, 58)}
    edge = max(drop, key=drop.get)
    if drop[edge] < 18:
        return None

    # The cutoff: the upper end of the highest band that is at most 6 dB under those below the edge.
    least = floor[edge - 6 : edge].min() - 6
    return 125.0 * next(k for k in range(edge + 5, 0, -1) if floor[k - 1] >= least)
