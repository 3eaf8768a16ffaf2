"""Band-limiting: how recordings lose their treble, and how to measure where.

Super-resolution learns from pairs that it makes itself: a full-band clip, and the same clip as a
recording of low rate would hold it. `band_limit` makes the second from the first, `random_band_limit`
with a filter drawn at random, so that the model does not learn to undo one filter alone. `find_cutoff`
measures the band limit of a recording from elsewhere, or says that it can't be known.

    x (N,) at 16 kHz --band_limit(cutoff Hz, family, order)--> (N,) float32, nothing above the cutoff
    x (N,), its file's rate --find_cutoff--> cutoff in Hz, or None: full-band, or in doubt

Public: BAND_LIMIT_VERSION, CUTOFF, FILTERS, band_limit, random_band_limit, find_cutoff, choose_cutoff,
choose_cutoffs.
"""
from __future__ import annotations

import numpy as np
import scipy.signal
from einops import reduce

from parts.audio import RATE
from parts.errors import UserError

CUTOFF = 2_000          # Hz: band limit of the inputs of previews and tables
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


# --- measuring it --------------------------------------------------------------------------------------

# ASSUMED, all of them: chosen on folds 1 to 3 of ESC-10 and SoundWorld's validation clips, with
# lab/score_cutoff.py.
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0)  # over time; 1.0 is the loudest frame
BAND_HZ = 62.5       # width of a band: four bins of the STFT
BANDS = 127          # the topmost band under 8 kHz is left out
RANGE_DB = 100       # what lies further below the loudest band counts as nothing
LEAST_FRAMES = 8     # about 0.3 s in which something sounds
ENOUGH_DROP = 40     # dB; drops are cut to 0..40 before their mean over QUANTILES is taken
LEAST_DROP = 9       # dB of that mean, where all above the edge is empty,
LEAST_EMPTY = 75     # that is this many dB under the loudest band;
STEEP_DROP = 35      # dB that are enough without
MOST_ABOVE = -45    # dB of the energy that may lie above the limit + 500 Hz
HIGHEST_HZ = 7_250   # above this nothing is left to restore


def find_cutoff(x: np.ndarray, rate: int = RATE) -> float | None:
    """Frequency (Hz) above which a recording holds nothing; None where that can't be known.

    x (N,) at 16 kHz, of any level. rate: of the file that it was read from, Hz, from 2,000; nothing lies
    above its half. None means full-band *or* in doubt: digital silence, less than about 0.3 s, an edge
    that may be the sound's own. How often it is wrong: lab/score_cutoff.py.

    A low-pass removes everything above one frequency at all times: loud frames, soft frames and the
    noise between sounds have the same edge. A dull sound (a knock, a bell) fades out smoothly, or its
    treble comes and goes with it, or the noise of its recording goes on to the top. So the spectrum is
    taken at seven quantiles over time, from the noise floor to the loudest frame. A limit is named only
    where

        edge    everything more than a fifth of an octave above it is lower than all of the half octave
                below it: by 9 dB or more, mean over the seven;
        empty   what lies above it is 75 dB under the loudest band, or the edge has 35 dB or more;
        energy  above the limit + 500 Hz lie at most -45 dB of the whole.

    A rate below 16 kHz is a limit of its own, where no lower one is found. Source: ASSUMED, constants
    above."""
    # Of a low rate, resampling has emptied the bands above its half, and those just below it fade.
    half_rate = min(rate, RATE) / 2
    bands = BANDS if rate >= RATE else int(0.9 * half_rate / BAND_HZ)
    power = _band_power(x)                                         # (frames, 128)
    if len(power) == 0:
        return None
    found = _find_edge(power, bands)
    if found is None and rate < RATE:
        return half_rate
    return found


def choose_cutoff(name, x: np.ndarray, rate: int, given: float | None) -> tuple[float, str]:
    """The band limit (Hz) to restore a recording from, and where it comes from, in words. x, rate: see
    find_cutoff; name: of its file; given: by the user, or None. UserError where it must be given."""
    found = find_cutoff(x, rate)
    if given is None:
        if found is None:
            raise UserError(f"{name}: no band limit found (full-band, or in doubt); name it with --cutoff HZ")
        return found, "found"
    if found is not None and found < 0.8 * given:
        return given, (f"given, but the input holds nothing above {found:.0f} Hz, and what lies between "
                       "stays empty: leave --cutoff out")
    return given, "given"


def choose_cutoffs(name, channels: np.ndarray, rate: int, given: float | None) -> list[tuple]:
    """choose_cutoff for each channel of a recording (C, N) -> (Hz, what to say of it). Of several, those of
    which no band limit is found are (None, why): to be left as they are. UserError where that is all."""
    chosen, wrong = [], None
    for x in channels:
        try:
            cutoff, source = choose_cutoff(name, x, rate, given) if x.any() else (None, "silent")
        except UserError as e:
            wrong = e
            cutoff, source = None, "full-band, or in doubt: left as it is"
        chosen.append((cutoff, f"band limit {cutoff:.0f} Hz ({source})" if cutoff else source))
    if wrong and not any(cutoff for cutoff, _ in chosen):
        raise wrong
    return chosen


def _band_power(x: np.ndarray) -> np.ndarray:
    """Power in bands of 62.5 Hz of the frames in which something sounds, (N,) -> (frames, 128): STFT
    1024/512, of a long recording some 4,000 frames, spread evenly. Side lobes lie 92 dB down
    (Blackman-Harris): a Hann window's would look like a sound's own skirt."""
    x = np.asarray(x, np.float64)
    if x.size == 0 or np.ptp(x) == 0:
        return np.zeros((0, 128))
    x = np.pad(x - x.mean(), (0, max(0, 1_024 - len(x))))
    hop = max(512, len(x) // 4_000)
    frames = np.lib.stride_tricks.sliding_window_view(x, 1_024)[::hop]
    spectrum = np.fft.rfft(frames * scipy.signal.get_window("blackmanharris", 1_024))[:, :512]
    power = reduce(np.abs(spectrum) ** 2, "frames (bands bins) -> frames bands", "mean", bins=4)
    return power[power.sum(1) > 1e-15 * power.sum(1).max()]


def _drops(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far spectra fall, levels (quantiles, bands) in dB -> edges (edges,), the first band above each,
    and drops (quantiles, edges) in dB: the lowest of the half octave below an edge, less the highest of
    all that lies a fifth of an octave or more above it."""
    bands = levels.shape[1]
    above = np.maximum.accumulate(levels[:, ::-1], 1)[:, ::-1]     # highest of band k and all above
    edges = np.arange(8, int(bands / 2**0.2))                      # from 500 Hz
    drops = [levels[:, int(k * 2**-0.5) : k].min(1) - above[:, _first_above(k)] for k in edges]
    return edges, np.array(drops).T


def _first_above(edge: int) -> int:
    """The first band a fifth of an octave above an edge."""
    return int(np.ceil(edge * 2**0.2))


def _find_edge(power: np.ndarray, bands: int) -> float | None:
    """The limit in Hz of a recording's power (frames, 128), looked for in its first `bands` bands."""
    if len(power) < LEAST_FRAMES:
        return None
    levels = np.quantile(power[:, :bands], QUANTILES, axis=0)      # (quantiles, bands)
    levels = 10 * np.log10(np.maximum(levels, levels.max() * 10 ** (-RANGE_DB / 10)))
    edges, drops = _drops(levels)
    score = drops.clip(0, ENOUGH_DROP).mean(0)                     # (edges,)
    near = np.flatnonzero(score >= score.max() - 1)                # edges about as steep as the steepest
    last, band = near[-1], edges[near[-1]]
    above = levels[QUANTILES.index(0.9), _first_above(band) :]
    empty = levels.max() - np.median(above) >= LEAST_EMPTY
    if score[last] < (LEAST_DROP if empty else STEEP_DROP):
        return None

    # The limit: the highest band at most 15 dB under the octave below the edge; median over those
    # quantiles that have the edge.
    clear = drops[:, last] >= drops[:, last].max() / 2
    spectra = levels[clear, : _first_above(band)]
    least = np.median(spectra[:, band // 2 : band], axis=1, keepdims=True) - 15
    highest = spectra.shape[1] - np.argmax(spectra[:, ::-1] >= least, axis=1)
    limit = max(edges[near[0]], np.median(highest))

    # Never one above which there is energy: it is moved up until there is not, within the slope of the edge.
    mean = power.mean(0)
    share = mean[::-1].cumsum()[::-1] / mean.sum()                 # of the energy, from band k up
    # Bands with at most that share of the energy from 500 Hz (8 bands) above them up.
    free = np.flatnonzero(share[8:] <= 10 ** (MOST_ABOVE / 10))
    limit = max(limit, free[0]) if len(free) else len(mean)
    if limit > min(_first_above(band), HIGHEST_HZ / BAND_HZ):
        return None
    return float(limit * BAND_HZ)
