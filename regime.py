"""Where is training? The regime variable r in [0, 1]: 0 while semantics is being acquired, 1 while detail is refined.

Idea.  Listen to what the network would make from its condition alone (pure noise, t = 1), through the ears of a frozen SSL
encoder phi, and compare with the true sound. While that discrepancy D still falls with each doubling of training, the network
is learning *what* to make; once D has stopped falling, it is learning how to make it well.

    D_j = mean over probe clips and frames of 1 - cos(phi_c(x0_hat), phi_c(x0)),  phi_c = phi - its data-set mean   # ASSUMED
    probes at steps k_j = round(16 * 2^(j/8)): eight a doubling of training
    s_j = -(least-squares slope of D on log2 k over the last 9 probes), with its standard error se_j
    rho_j = clip(s_j / ref, 0, 1), ref = the largest significant slope so far;   r_j = 1 - EMA_0.3(rho)             # ASSUMED

Progress is counted by doubling because learning curves are close to straight in log k; against raw steps the slope collapses
within the first tenth of a run. r reads D only through s / ref, so neither its scale nor its offset matters.

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the network predicts v;
x0_hat = x_t - t v_hat. B batch, T tokens, C latent channels, F features. k = step, K = planned steps.

The file knows nothing of what r drives, nor of any model: `predict` and `features` are passed in as functions.

    python regime.py          # demo: r on four synthetic discrepancy curves with known answers
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PER_DOUBLING = 8   # probes a doubling of training
WINDOW = PER_DOUBLING + 1  # probes of a slope: one doubling, both ends
EMA = 0.3          # weight of the newest rho
MIN_T = 4.0        # a slope must be this many standard errors
MIN_RELATIVE = 0.02  # and this share of the first probes' mean D, a doubling
NO_SIGNAL = 0.15   # share of K after which, without one significant slope, the clock takes over
SOURCES = ("slope", "loss", "clock", "replay")


def probe_steps(K: int) -> list[int]:
    """Steps k_j = round(16 * 2^(j/8)) up to K, each once.  # ASSUMED"""
    j = np.arange(PER_DOUBLING * max(0, int(np.ceil(np.log2(max(K, 16) / 16)))) + 1)
    return sorted({k for k in np.round(16 * 2 ** (j / PER_DOUBLING)).astype(int).tolist() if k <= K})


def slope(k, D) -> tuple[float, float]:
    """-(least-squares slope of D on log2 k) and its standard error; positive when D falls. k, D: sequences of n >= 3."""
    x, y = np.log2(np.asarray(k, float)), np.asarray(D, float)
    x = x - x.mean()
    b = (x * y).sum() / (x**2).sum()
    residual = y - y.mean() - b * x
    return float(-b), float(np.sqrt((residual**2).sum() / (len(x) - 2) / (x**2).sum()))


def discrepancy(a: Tensor, b: Tensor, mean: Tensor | None = None) -> Tensor:
    """1 - cosine of centred features, mean over frames: (B, T, F) x 2 -> (B,), in float32.

    mean (F,): phi's data-set mean. Uncentred SSL features all point nearly the same way, and the cosine would say nothing."""
    a, b = a.float(), b.float()
    if mean is not None:
        a, b = a - mean, b - mean
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-6).mean(-1)


@torch.no_grad()
def probe(predict, features, x0: Tensor, eps: Tensor, levels=(1.0, 0.9, 0.7, 0.5), mean: Tensor | None = None) -> dict[float, float]:
    """D at each noise level: {t: mean over the probe clips}.

    predict(x_t (B, T, C), t (B,)) -> v_hat; features(x0 (B, T, C)) -> (B, T, F). x0 and eps are the same tensors at every
    probe: with fresh noise the slope would drown in it, and the levels are fixed, not drawn, or a sampler that follows r
    would bend the signal that drives it. The caller puts the network in eval mode."""
    target, out = features(x0), {}
    for t in levels:
        x_t = (1 - t) * x0 + t * eps
        v_hat = predict(x_t, x0.new_full((len(x0),), t))
        out[t] = float(discrepancy(features(x_t - t * v_hat), target, mean).mean())
    return out


class Regime:
    """r from one of four sources. Small, printable state; resuming recomputes the slopes exactly.

    slope: `update(k, D)` at the probe steps. loss: the same with the training loss in place of D. clock: r = k / K.
    replay: r of another run, read from its log.jsonl (the random and yoked controls). K: planned steps."""

    def __init__(self, source: str, K: int, replay: str | Path = ""):
        if source not in SOURCES:
            raise ValueError(f"unknown regime source {source!r}: one of {', '.join(SOURCES)}")
        self.source, self.K = source, K
        self.replayed = read_r(replay) if source == "replay" else None
        self.load_state_dict({"k": [], "D": []})

    @property
    def no_signal(self) -> bool:
        """True once the curve has had its chance (15 % of K) and shown no significant fall: r then follows the clock."""
        return self.source in ("slope", "loss") and self.ref is None and bool(self.k) and self.k[-1] >= NO_SIGNAL * self.K

    def update(self, k: int, D: float) -> None:
        """Take one probe. A value that is not finite is refused: it would poison every later slope."""
        if not np.isfinite(D):
            raise ValueError(f"discrepancy at step {k} is {D}")
        self.k.append(int(k))
        self.D.append(float(D))
        if len(self.k) < WINDOW:
            return
        self.s, se = slope(self.k[-WINDOW:], self.D[-WINDOW:])
        if self.s > MIN_T * se and self.s > MIN_RELATIVE * abs(np.mean(self.D[:WINDOW])):
            self.ref = max(self.ref or 0.0, self.s)
        if self.ref:
            rho = float(np.clip(self.s / self.ref, 0, 1))
            self.ema = rho if self.ema is None else (1 - EMA) * self.ema + EMA * rho

    def r(self, k: int) -> float:
        """r at step k, in [0, 1]; between probes the last value holds."""
        if self.source == "replay":
            steps, values = self.replayed
            return float(values[max(0, np.searchsorted(steps, k, side="right") - 1)])
        if self.source == "clock" or self.no_signal:
            return min(1.0, k / self.K)
        return 0.0 if self.ema is None else 1.0 - self.ema

    def state_dict(self) -> dict:
        return {"k": self.k, "D": self.D}

    def load_state_dict(self, state: dict) -> None:
        """Replays the recorded probes, so the result is bitwise that of never having stopped."""
        self.k, self.D = [], []                      # probes so far
        self.s = self.ref = self.ema = None          # last slope; largest significant slope; EMA of rho
        for k, D in zip(state["k"], state["D"]):
            self.update(k, D)


def read_r(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(steps, r) of a run's log.jsonl; ValueError if it holds no r."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    pairs = sorted({(row["step"], row["r"]) for row in rows if "r" in row})
    if not pairs:
        raise ValueError(f"{path}: holds no value of r")
    return np.array([k for k, _ in pairs]), np.array([r for _, r in pairs])


def demo() -> None:
    """r at powers of two on four curves (with 0.5 % noise): falling to a floor at step 512, always falling, flat, rising."""
    K, rng = 8_192, np.random.default_rng(0)
    curves = {"falls until 512": lambda k: 1 - 0.08 * np.log2(min(k, 512)), "falls for ever": lambda k: 1 - 0.05 * np.log2(k),
              "flat": lambda k: 0.8, "rising": lambda k: 0.5 + 0.02 * np.log2(k)}
    print("step              " + "".join(f"{2**j:8d}" for j in range(5, 14)))
    final = {}
    for name, curve in curves.items():
        regime, row = Regime("slope", K), []
        for k in probe_steps(K):
            regime.update(k, curve(k) + 0.005 * rng.standard_normal())
            if np.log2(k) % 1 == 0 and k >= 32:
                row.append(regime.r(k))
        final[name] = (row[-1], regime.no_signal)
        print(f"{name:18s}" + "".join(f"{r:8.2f}" for r in row) + ("   no signal: the clock" if regime.no_signal else ""))
    assert final["falls until 512"][0] > 0.9 and final["falls for ever"][0] < 0.4 and final["flat"][1] and final["rising"][1]


if __name__ == "__main__":
    demo()
