"""Where is training? The regime variable r in [0, 1]: 0 acquires semantics, 1 refines detail.

Idea. Let the network predict the sound from its condition alone (input: pure noise, t = 1), take the features
of a frozen self-supervised (SSL) encoder phi, and compare them with those of the true sound. While that
discrepancy D still falls with each doubling of training, the network is learning *what* to make; once D has
stopped falling, it is learning how to make it well.

    D_j   = mean over probe clips and frames of 1 - cos(phi_c(x0_hat), phi_c(x0))            # ASSUMED
            phi_c = phi - its data-set mean; probe j at step k_j = round(16 * 2^(j/8))
    s_n   = -(least-squares slope of the last n D on log2 k): progress per doubling of training
    ref   = the largest s_9 so far that is significant (n = 9: a doubling)
    rho_j = clip(s_6 / ref, 0, 1);   r_j = 1 - EMA_0.6(rho), 0 until there is a ref          # ASSUMED
    no ref by 0.15 K, K the planned steps: r = k_j / K, the clock, until there is one        # ASSUMED

Progress is counted by doubling because learning curves are close to straight in log k; against raw steps the
slope collapses within the first tenth of a run. Once a slope has been accepted, r reads D only through s /
ref, so neither the scale of D nor its offset matters. Two windows, because one of 9 probes with EMA 0.3 found
a planted switch 0.8 doublings late; 6 and 0.6 find it within half a doubling (tests/test_regime.py).

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the
network predicts v; x0_hat = x_t - t v_hat. B batch, T tokens, C latent channels, F features. k = step, K =
planned steps.

What r drives is said in train.drive: lambda, m and mu. This file knows nothing of them, nor of any model:
`predict` and `extract` are passed in as functions.

Public: Regime (state, r), probe, discrepancy, signal, levels_of, slope, probe_steps, read_r, hold_last.

    python regime.py          # demo: r on four synthetic discrepancy curves with known answers
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

PER_DOUBLING = 8           # probes per doubling of training
TESTED_WINDOW = PER_DOUBLING + 1  # probes of the slope that is tested: one doubling, both ends
FOLLOWED_WINDOW = 6        # probes of the slope that r follows
NEWEST_SHARE = 0.6         # of the newest rho in r's moving average
MIN_STANDARD_ERRORS = 4.0  # a significant slope is this many standard errors
MIN_RELATIVE = 0.02        # and, per doubling, at least this share of the first nine probes' mean D
NO_SIGNAL = 0.15           # share of K after which, without one significant slope, r follows the clock
SOURCES = ("slope", "loss", "clock", "replay")
LEVELS = (1.0, 0.9, 0.7, 0.5)  # noise levels of a full probe
SIGNALS = ("t1", "levels", "ratio", "latent")


# --- the discrepancy ----------------------------------------------------------------------------------------

def discrepancy(a: Tensor, b: Tensor, mean: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """1 - cosine of centred features, mean over frames, in float32: (B, T, F) x 2 -> (B,).

    mask (B, T): True at real frames. mean (F,): phi's data-set mean. Uncentred SSL features all point nearly
    the same way, and their cosine would say nothing."""
    a, b = a.float(), b.float()
    if mean is not None:
        a, b = a - mean, b - mean
    # D = 1 - cos(phi_c(x0_hat), phi_c(x0))                                                        # ASSUMED
    distance = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-6)   # (B, T)
    if mask is None:
        return distance.mean(-1)
    return (distance * mask).sum(-1) / mask.sum(-1).clamp_min(1)


@torch.no_grad()
def probe(predict, extract, x0: Tensor, eps: Tensor, levels=(1.0,), mean: Tensor | None = None,
          target: Tensor | None = None, mask: Tensor | None = None) -> dict[float, float]:
    """Measure D at each noise level -> {t: mean over the probe clips}.

    predict(x_t (B, T, C), t (B,)) -> v_hat; extract(x0 (B, T, C)) -> features (B, T, F); target: extract(x0),
    if at hand. x0 and eps are the same tensors at every probe: with fresh noise the slope would drown in it.
    The levels are fixed, not drawn, or a sampler that follows r would bend the signal that drives it.

    Probe the averaged (EMA) weights: at a constant learning rate the raw ones scatter D by two to three times
    as much (results/log.md), and an average over the last tenth of a run is only 0.14 doublings late."""
    if target is None:
        target = extract(x0)
    D = {}
    for t in levels:
        x_t = (1 - t) * x0 + t * eps                       # the interpolant at level t
        v_hat = predict(x_t, x0.new_full((len(x0),), t))
        x0_hat = x_t - t * v_hat
        D[t] = float(discrepancy(extract(x0_hat), target, mean, mask).mean())
    return D


def levels_of(kind: str) -> tuple[tuple[float, ...], bool]:
    """What a signal is made of: (noise levels, is D under shuffled conditions needed?)."""
    return LEVELS[1:] if kind == "levels" else (1.0,), kind == "ratio"


def signal(kind: str, D: dict[float, float], shuffled: float | None = None) -> float:
    """The one number of a probe {t: D} whose slope is taken.

    t1: D at t = 1, where whatever is right came from the condition. levels: mean over t = .5, .7, .9. ratio:
    D(t = 1) over the same with the clips' conditions exchanged, so that learning the average sound does not
    count. latent: D(t = 1) with features = identity, the proxy that needs no teacher."""
    if kind == "levels":
        return float(np.mean([D[t] for t in LEVELS[1:]]))
    if kind == "ratio":
        return D[1.0] / shuffled
    return D[1.0]


# --- its slope ----------------------------------------------------------------------------------------------

def probe_steps(K: int) -> list[int]:
    """Steps k_j = round(16 * 2^(j/8)) up to K, each once.  # ASSUMED"""
    doublings = int(np.ceil(np.log2(max(K, 16) / 16)))
    j = np.arange(PER_DOUBLING * doublings + 1)
    steps = np.round(16 * 2 ** (j / PER_DOUBLING)).astype(int)
    return sorted({k for k in steps.tolist() if k <= K})


def slope(k, D) -> tuple[float, float]:
    """-(least-squares slope of D on log2 k), positive when D falls, and its standard error. k, D: n >= 3."""
    fit = scipy.stats.linregress(np.log2(np.asarray(k, float)), np.asarray(D, float))
    return float(-fit.slope), float(fit.stderr)


# --- the regime ---------------------------------------------------------------------------------------------

class Regime:
    """r from one of four sources; its state is the list of probes, small and printable. K: planned steps.

    slope: `update(k, D)` at the probe steps, where `probe_index(k)` is not None. loss: the same, with D the
    mean of the training losses since the last one (`observe(loss)` each step). clock: r = k / K. replay:FILE:
    r of another run, from its log.jsonl. ValueError for an unknown source or a file without r."""

    def __init__(self, source: str, K: int):
        self.source, _, path = source.partition(":")
        if self.source not in SOURCES or (self.source == "replay") != bool(path):
            raise ValueError(f"unknown regime source {source!r}: slope, loss, clock or replay:FILE")
        self.K = K
        self.steps = {k: j for j, k in enumerate(probe_steps(K))}
        self.replayed = read_r(path) if path else None
        self.k: list[int] = []          # probes so far: step
        self.D: list[float] = []        # and discrepancy
        self.losses = torch.zeros(2)    # [sum, number] of training losses since the last probe
        self.s: float | None = None     # last tested slope
        self.ref: float | None = None   # largest significant slope
        self.ema: float | None = None   # moving average of rho

    def probe_index(self, k: int) -> int | None:
        """j where step k is the probe step k_j, else None; j % 8 == 0 once a doubling."""
        return self.steps.get(k)

    @property
    def measured(self) -> bool:
        """True where r depends on what is measured."""
        return self.source in ("slope", "loss")

    @property
    def no_signal(self) -> bool:
        """True once 15 % of K have passed without a significant fall: r follows the clock."""
        had_its_chance = bool(self.k) and self.k[-1] >= NO_SIGNAL * self.K
        return self.measured and self.ref is None and had_its_chance

    def observe(self, loss: Tensor) -> None:
        """Take the training loss of a step. The sum stays on the loss's device: no synchronization."""
        one_more = torch.stack([loss.detach().float(), torch.ones_like(loss)])
        self.losses = self.losses.to(loss.device) + one_more

    def mean_loss(self) -> float:
        """Mean of the observed losses, which are then forgotten."""
        total, n = self.losses.tolist()
        self.losses = torch.zeros(2)
        return total / max(n, 1)

    def update(self, k: int, D: float) -> None:
        """Take the probe of step k. ValueError where D is not finite: it would poison every later slope."""
        if not np.isfinite(D):
            raise ValueError(f"discrepancy at step {k} is {D}")
        self.k.append(int(k))
        self.D.append(float(D))
        if len(self.k) < TESTED_WINDOW:
            return

        # Is there a signal? The slope over a doubling counts if it is far from 0 and not tiny.
        self.s, standard_error = slope(self.k[-TESTED_WINDOW:], self.D[-TESTED_WINDOW:])
        least = MIN_RELATIVE * abs(np.mean(self.D[:TESTED_WINDOW]))
        if self.s > MIN_STANDARD_ERRORS * standard_error and self.s > least:
            self.ref = max(self.ref or 0.0, self.s)

        # rho = clip(s_6 / ref, 0, 1): today's progress per doubling as a share of the best; then its
        # NEWEST_SHARE.
        if self.ref:
            recent, _ = slope(self.k[-FOLLOWED_WINDOW:], self.D[-FOLLOWED_WINDOW:])
            rho = float(np.clip(recent / self.ref, 0, 1))
            self.ema = rho if self.ema is None else (1 - NEWEST_SHARE) * self.ema + NEWEST_SHARE * rho

    def r(self, k: int) -> float:
        """r at step k, in [0, 1]; between probes the last value holds."""
        if self.source == "replay":
            return float(hold_last(*self.replayed, k))
        if self.source == "clock":
            return min(1.0, k / self.K)
        if self.no_signal:
            return min(1.0, self.k[-1] / self.K)
        return 0.0 if self.ema is None else 1.0 - self.ema

    def notes(self, k: int) -> dict:
        """What a log should keep at step k besides r."""
        notes = {"no_signal": 1} if self.no_signal else {}
        if k in self.steps and self.s is not None:
            notes["slope"] = self.s
        return notes

    def state_dict(self) -> dict:
        return {"k": self.k, "D": self.D, "losses": self.losses.cpu()}

    def load_state_dict(self, state: dict) -> None:
        """Replays the recorded probes, so the result is bitwise that of never having stopped."""
        self.k, self.D, self.losses = [], [], state["losses"]
        self.s = self.ref = self.ema = None
        for k, D in zip(state["k"], state["D"]):
            self.update(k, D)


# --- r of another run ---------------------------------------------------------------------------------------

def read_r(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(steps, r) of a run's log.jsonl; ValueError if it holds no r."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    pairs = sorted({(row["step"], row["r"]) for row in rows if "r" in row})
    if not pairs:
        raise ValueError(f"{path}: holds no value of r")
    return np.array([k for k, _ in pairs]), np.array([r for _, r in pairs])


def hold_last(steps: np.ndarray, values: np.ndarray, k) -> np.ndarray:
    """values at step(s) k: the last one at or before k, or the first. steps (n,) ascending, values (n,)."""
    return values[np.maximum(0, np.searchsorted(steps, k, side="right") - 1)]


def demo() -> None:
    """r at powers of two on four curves with 0.5 % noise."""
    K, rng = 8_192, np.random.default_rng(0)
    curves = {"falls until 512": lambda k: 1 - 0.08 * np.log2(min(k, 512)),
              "falls for ever": lambda k: 1 - 0.05 * np.log2(k),
              "flat": lambda k: 0.8,
              "rising": lambda k: 0.5 + 0.02 * np.log2(k)}
    print("step              " + "".join(f"{2**j:8d}" for j in range(5, 14)))
    final = {}
    for name, curve in curves.items():
        regime, at_powers_of_two = Regime("slope", K), []
        for k in probe_steps(K):
            regime.update(k, curve(k) + 0.005 * rng.standard_normal())
            if np.log2(k) % 1 == 0 and k >= 32:
                at_powers_of_two.append(regime.r(k))
        final[name] = at_powers_of_two[-1], regime.no_signal
        note = "   no signal: the clock" if regime.no_signal else ""
        print(f"{name:18s}" + "".join(f"{r:8.2f}" for r in at_powers_of_two) + note)
    assert final["falls until 512"][0] > 0.9 and final["falls for ever"][0] < 0.4
    assert final["flat"][1] and final["rising"][1]


if __name__ == "__main__":
    demo()
