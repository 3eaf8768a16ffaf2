"""Statistics of experiments: intervals, paired tests, time to quality, correlation of rates. Pure functions
of arrays.

Intervals are Student's t over seeds, of paired differences: all arms of one seed share their data and their
noise, and pairing takes out what they share. p-values are of sign-flip tests, exact up to 16 seeds; with few
seeds the smallest p that can be reached (2 / 2^n) matters as much as the p that was found.

"Time to quality" compares isotonic fits of two learning curves over all of the quality that both reach. The
first passage of a noisy curve would not do: the more evaluations, the earlier the first lucky one, so an arm
is faster than itself.

Comes in: final values (n,) of n seeds, or curves (x, y), x steps or seconds (n,), y a quality (n,), higher is
better. Goes out: floats, and dicts of floats that can be written as JSON.

Public: interval, smallest_p, sign_flip, holm, paired, isotonic, passage, time_to_quality, time_to_end,
speed_up, rate_correlation, format_interval, format_ratio.
"""
from __future__ import annotations

import functools
import itertools
import statistics

import numpy as np
import scipy.optimize

from parts.metrics import mean_interval

ROUNDING = 1e-12    # two sums that differ by less are equal
GRID = 20           # qualities at which times are compared
MANY = 100_000      # random sign patterns, where all of them would be too many


# --- differences over seeds ---------------------------------------------------------------------------------

def interval(x) -> tuple[float, float, float]:
    """Mean and 95 % Student-t interval of x (n,); all equal: no width; n = 1: NaN ends."""
    return (float(np.mean(x)), *mean_interval(x))


def format_interval(ends, sign: bool = True, digits: int = 3) -> str:
    """An interval (low, high) as text; "-" where one seed has none."""
    low, high = np.array(ends, float)                              # None in a file is NaN
    if np.isnan(low):
        return "-"
    plus = "+" if sign else ""
    return f"[{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"


def format_ratio(found: dict) -> str:
    """The ratio of `speed_up` and its interval as text."""
    return f"{found['ratio']:.2f} {format_interval(found['interval'], sign=False, digits=2)}"


@functools.lru_cache
def _signs(n: int) -> np.ndarray:
    """All 2^n sign patterns (2^n, n) up to n = 16, else 100,000 random ones and the observed one."""
    if n <= 16:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    random = np.random.default_rng(0).choice((1.0, -1.0), (MANY, n))
    return np.concatenate([np.ones((1, n)), random])


def smallest_p(n: int) -> float:
    """The smallest p that a sign-flip test of n pairs can reach: the observed signs and their mirror image of
    2^n."""
    return max(2 / 2**n, 1 / MANY)


def sign_flip(differences) -> tuple[float, float]:
    """Two-sided sign-flip permutation test of paired differences (n,) -> (p, smallest p that n can reach).
    All zero: p = 1."""
    # Not scipy.stats.permutation_test: at n = 8 and n = 16 it takes 80 and 1,000 times as long for the same
    # p, and where differences sum to zero rounding breaks its ties (p = 0.81 to 0.94 instead of 1).
    d = np.asarray(differences, float)
    flipped = np.abs(_signs(len(d)) @ d)                                                   # (2^n,)
    return float(np.mean(flipped >= abs(d.sum()) - ROUNDING)), smallest_p(len(d))


def holm(p_values) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    n = len(p_values)
    adjusted = [0.0] * n
    worst = 0.0
    for rank, k in enumerate(np.argsort(p_values)):
        worst = max(worst, min(1.0, (n - rank) * p_values[k]))
        adjusted[k] = float(worst)
    return adjusted


def paired(a, b) -> dict:
    """Arm a (n,) against arm b (n,) over the same seeds: mean difference, interval, p, and the smallest p
    there is at this n."""
    d = np.asarray(a, float) - np.asarray(b, float)
    mean, low, high = interval(d)
    p, least = sign_flip(d)
    return {"difference": mean, "interval": [low, high], "p": p, "least_p": least, "n": len(d)}


# --- time to quality ----------------------------------------------------------------------------------------

def isotonic(y) -> np.ndarray:
    """Least-squares non-decreasing fit of a curve (n,)."""
    return scipy.optimize.isotonic_regression(np.asarray(y, float)).x


def passage(x, y, q: np.ndarray) -> np.ndarray:
    """log x at which the isotonic fit of the curve (x, y), (n,) each, reaches each q (m,); linear in log x
    between points -> (m,)."""
    fit, log_x, q = isotonic(y), np.log(np.asarray(x, float)), np.asarray(q, float)
    # The fit is flat over plateaus and rises between the end of one and the start of the next.
    after = np.searchsorted(fit, q - 1e-12).clip(0, len(fit) - 1)       # first point at q: a plateau's start
    before = np.maximum(after - 1, 0)                                   # the end of the one before
    rise = fit[after] - fit[before]
    share = np.where(rise > 1e-12, (q - fit[before]) / np.maximum(rise, 1e-12), 1).clip(0, 1)
    return log_x[before] + share * (log_x[after] - log_x[before])


def time_to_quality(x_ref, ref, x_arm, arm) -> tuple[float, float]:
    """One seed's log(T_ref(q) / T_arm(q)), averaged over the quality q that both fits reach, and the share of
    the reference's range that this is (the rest is censored). > 0: the arm is sooner. NaN where they share no
    range. Antisymmetric in its arguments.

    x: steps or seconds, ref and arm: quality (higher is better), (n,) each."""
    fit_ref, fit_arm = isotonic(ref), isotonic(arm)
    low = max(fit_ref[0], fit_arm[0])
    high = min(fit_ref[-1], fit_arm[-1])
    if high <= low:
        return float("nan"), 0.0
    q = np.linspace(low, high, GRID + 2)[1:-1]
    log_ratio = np.mean(passage(x_ref, ref, q) - passage(x_arm, arm, q))
    share = (high - low) / max(fit_ref[-1] - fit_ref[0], 1e-12)
    return float(log_ratio), float(share)


def time_to_end(x_ref, ref, x_arm, arm) -> float:
    """T_ref(q) / T_arm(q) of one seed at q, the quality where the reference ends; 0.0: the arm never reaches
    it. Of two arms that are alike, one in two never does."""
    q = isotonic(ref)[-1:]                                             # (1,)
    if isotonic(arm)[-1] < q[0]:
        return 0.0
    return float(np.exp(passage(x_ref, ref, q) - passage(x_arm, arm, q))[0])


def speed_up(curves_ref: list[tuple], curves_arm: list[tuple]) -> dict:
    """T_ref / T_arm over seeds, a curve (x, y) a seed: geometric mean with a t interval of the log ratios,
    seeds that share any quality (n) of all (of), and the mean share of the reference's range that these n
    share (shared). Besides, at the quality where the reference ends: the median over all seeds (at_end; None
    unless more than half of them reach it), and how many do (reach_end)."""
    at_end = [time_to_end(*ref, *arm) for ref, arm in zip(curves_ref, curves_arm)]
    reached = int(np.count_nonzero(at_end))
    end = {"at_end": statistics.median(at_end) if 2 * reached > len(at_end) else None, "reach_end": reached}
    found = [time_to_quality(*ref, *arm) for ref, arm in zip(curves_ref, curves_arm)]
    logs = np.array([log_ratio for log_ratio, _ in found])
    shared = np.array([share for _, share in found])
    known = ~np.isnan(logs)
    if known.sum() == 0:
        return {"ratio": float("nan"), "interval": [float("nan")] * 2, "n": 0, "of": len(logs), "shared": 0.0,
                **end}
    mean, low, high = interval(logs[known])
    return {"ratio": float(np.exp(mean)), "interval": [float(np.exp(low)), float(np.exp(high))],
            "n": int(known.sum()), "of": len(logs), "shared": float(shared[known].mean()), **end}


# --- does one curve follow another? -------------------------------------------------------------------------

def _rates(runs: list[dict], key: str) -> np.ndarray:
    """Change of a curve per unit of x between neighbouring points: (runs, points - 1)."""
    return np.array([np.diff(run[key]) / np.diff(run["x"]) for run in runs])


def _correlation_at_same_step(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of a and b (runs, points), each less its mean over runs. Two trends always correlate; what
    is left is which run is ahead at that point. Clipped, because Fisher's z of 1 is infinite."""
    own_a, own_b = (a - a.mean(0)).ravel(), (b - b.mean(0)).ravel()
    return float(np.clip(np.corrcoef(own_a, own_b)[0, 1], -0.999999, 0.999999))


def _orders(n: int) -> list:
    """All orders of n runs up to n = 6, else the observed one and 2,000 random ones."""
    if n <= 6:
        return list(itertools.permutations(range(n)))
    return [np.arange(n), *(np.random.default_rng(k).permutation(n) for k in range(2_000))]


def rate_correlation(runs: list[dict]) -> dict:
    """Do runs learn semantics where D falls? Each run {x: log2 step, D, quality}, (n,) each, the same x in
    all.

    The rates between neighbouring points, less their mean over runs, are correlated over all runs and points.
    The unit is the run: the interval is the jackknife's over runs (of Fisher's z), p is by exchanging whole
    runs. Runs of one setting that differ in the seed alone are more alike than others: where there are such,
    the interval is too narrow and p too small."""
    falling, rising = -_rates(runs, "D"), _rates(runs, "quality")  # (runs, points - 1); falling D is progress
    n = len(runs)
    whole = _correlation_at_same_step(falling, rising)
    if not np.isfinite(whole):                                          # a quality that never changes
        nothing = float("nan")
        return {"correlation": nothing, "interval": [nothing] * 2, "p": 1.0, "runs": n,
                "points": falling.shape[1]}

    # Jackknife: leave out one run at a time; the pseudo-values are treated as n independent numbers.
    pseudo = []
    for k in range(n):
        others = np.delete(np.arange(n), k)
        without_k = _correlation_at_same_step(falling[others], rising[others])
        pseudo.append(n * np.arctanh(whole) - (n - 1) * np.arctanh(without_k))
    _, low, high = interval(pseudo)

    # Null: one run's D beside another run's quality.
    null = [_correlation_at_same_step(falling[list(order)], rising) for order in _orders(n)]
    p = float(np.mean(np.abs(null) >= abs(whole) - ROUNDING))
    return {"correlation": whole, "interval": [float(np.tanh(low)), float(np.tanh(high))], "p": p, "runs": n,
            "points": falling.shape[1]}
