"""Where is training? The regime variable r in [0, 1]: 0 acquires semantics, 1 refines detail.

Idea. Take the features of a frozen self-supervised (SSL) encoder phi of what the network predicts, and
compare them with those of the true sound. While that discrepancy D still falls fast, the network is learning
*what* to make; once it falls no more, the network is learning how to make it well.

    D_j   = mean over probe clips, noise levels t = .5, .7, .9 and tokens of
            1 - cos(phi_c(x0_hat), phi_c(x0)),  x0_hat = x_t - t v_hat                        # ASSUMED
            phi_c = phi - its data-set mean; probe j at step k_j = round(32 * 2^(j/4))
    s_j   = -(least-squares slope of the last 6 D on k^(1/3))
    ref   = the largest s so far that is significant
    rho_j = clip(s_j / ref, 0, 1);   r_j = 1 - EMA(rho), 0 until there is a ref               # ASSUMED
            EMA: the newest rho weighs 0.6
    no ref by 0.15 K (K planned steps) and six probes: r = k_j / K, the clock, until there is # ASSUMED
          one; six probes end at step 76, so a shorter run keeps r = 0

Why not t = 1? There x_t says nothing about x0, and the best prediction is the *mean* of all sounds that the
condition allows, which is no sound: the better the mean, the further its features are from any sound's. D
then stands still, or rises, while captions are being learnt (docs/method.md). Which discrepancy to take was
chosen by a rule on recorded runs: lab/regime_choice.py.

Why k^(1/3)? Against steps k the slope collapses within the first tenth of a run; against log k, per doubling,
it hardly falls at all where learning curves are straight in log k, as those of captions are, and r stays at
0.2 when four fifths of the captions are understood. Between the two, the cube root was nearest to measured
progress on the five runs that chose it (results/log.md, as are later checks). Once a slope has been accepted,
r reads D only through s / ref, so neither the scale of D nor its offset matters.

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the
network predicts v; x0_hat = x_t - t v_hat. B batch, T tokens, C latent channels, F features. k = step, K =
planned steps.

What r drives is said in train.drive: guidance, timesteps, structure. This file knows nothing of them, nor of
any model: `predict` and `extract` are passed in as functions.

Public: Regime (state, r), Probe, probe, discrepancy, over_tokens, signal, SIGNALS, slope, probe_steps,
read_r, hold_last.

    python regime.py          # demo: r on four synthetic discrepancy curves with known answers
"""
from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

FIRST = 32                 # step of the first probe
PER_DOUBLING = 4           # probes per doubling of training
WINDOW = 6                 # probes of a slope: five quarters of a doubling.  # ASSUMED
POWER = 1 / 3              # of k, the axis of the slope: between log k and k.  # ASSUMED
NEWEST_SHARE = 0.6         # of the newest rho in r's moving average.  # ASSUMED
MIN_STANDARD_ERRORS = 4.0  # a significant slope is this many standard errors.  # ASSUMED
MIN_RELATIVE = 0.02        # and, over its window, a fall of this share of the first mean D.  # ASSUMED
NO_SIGNAL = 0.15           # share of K after which, without one significant slope, r follows the clock
SOURCES = ("slope", "loss", "agreement", "clock", "replay")

# x0 is compared with x0_hat in one step from x_t ("t0.9": t = 0.9), or with a sample of SAMPLE_STEPS steps;
# token by token, or ("-pooled") by the mean feature of the clip.
SAMPLE_STEPS = 4
PREDICTIONS = ("t1.0", "t0.9", "t0.7", "t0.5", "sample")
LEVELS = ("t0.9", "t0.7", "t0.5")
# A signal, the number whose slope is taken, is the mean of some of them.
SIGNALS = {"levels": LEVELS, "levels-pooled": tuple(f"{name}-pooled" for name in LEVELS)}
SIGNALS |= {name + how: (name + how,) for name in PREDICTIONS for how in ("", "-pooled")}
SIGNALS["latent"] = LEVELS  # the proxy that needs no teacher: features are the latents themselves


# --- the discrepancy ----------------------------------------------------------------------------------------

def discrepancy(a: Tensor, b: Tensor, mean: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """1 - cosine of centred features, mean over tokens, in float32: (B, T, F) x 2 -> (B,).

    mask (B, T): True at real tokens. mean (F,): phi's data-set mean. Uncentred SSL features all point nearly
    the same way, and their cosine would say nothing. ValueError for features of another shape."""
    if a.ndim != 3:
        raise ValueError(f"features of shape {tuple(a.shape)}: must be (B, T, F); of one vector a clip "
                         "x[:, None], of a map (B, F, H, W) x.flatten(2).mT")
    a, b = a.float(), b.float()
    if mean is not None:
        a, b = a - mean, b - mean
    # D = 1 - cos(phi_c(x0_hat), phi_c(x0))                                                        # ASSUMED
    distance = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-6)   # (B, T)
    return over_tokens(distance, mask)


def over_tokens(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens, those where mask (B, T) is True: (B, T, ...) -> (B, ...)."""
    if mask is None:
        return x.mean(1)
    mask = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
    return (x * mask).sum(1) / mask.sum(1).clamp_min(1)


def predicted(name: str, predict, x0: Tensor, eps: Tensor) -> Tensor:
    """What the network makes of noisy clips, one of PREDICTIONS -> (B, T, C).

    predict(x_t (B, T, C), t (B,)) -> v_hat."""
    def v_hat(x: Tensor, t: float) -> Tensor:
        return predict(x, x0.new_full((len(x0),), t))

    if name == "sample":                                   # Euler steps from pure noise
        x, times = eps, torch.linspace(1, 0, SAMPLE_STEPS + 1).tolist()
        for t, t_next in itertools.pairwise(times):
            x = x + (t_next - t) * v_hat(x, t)
        return x
    t = float(name[1:])
    x_t = (1 - t) * x0 + t * eps                           # the interpolant at level t
    return x_t - t * v_hat(x_t, t)                         # x0_hat


@torch.no_grad()
def probe(predict, extract, x0: Tensor, eps: Tensor, names=LEVELS, mean: Tensor | None = None,
          target: Tensor | None = None, mask: Tensor | None = None) -> dict[str, float]:
    """Measure D of some PREDICTIONS, token by token and pooled -> {name: mean over the probe clips}.

    predict: see predicted; extract(x0 (B, T, C)) -> features (B, T, F), mean (F,) of them; target: of x0, if
    at hand; mask (B, T): where it is False, phi sees x0 in both. x0, eps (B, T, C) are the same at every
    probe: in fresh noise the change of D would be lost. The levels are fixed, not drawn: a sampler that
    follows r must not change what r is read from. Probe the averaged (EMA) weights: at a constant learning
    rate the raw ones scatter D about three times as much (results/log.md), and the average is only a tenth of
    the steps so far behind."""
    if target is None:
        target = extract(x0)
    D = {}
    pooled_target = over_tokens(target.float(), mask)[:, None]
    for name in names:
        x = predicted(name, predict, x0, eps)
        x = x if mask is None else torch.where(mask[..., None], x, x0)
        features = extract(x).float()
        pooled = over_tokens(features, mask)[:, None]      # (B, 1, F): a clip of one token
        D[name] = float(discrepancy(features, target, mean, mask).mean())
        D[f"{name}-pooled"] = float(discrepancy(pooled, pooled_target, mean).mean())
    return D


def signal(kind: str, D: dict[str, float]) -> float:
    """The one number of a probe whose slope is taken."""
    return float(np.mean([D[name] for name in SIGNALS[kind]]))


class Probe:
    """D of the same ten clips and the same noise at every probe: `batch`, the first ten of the given one.

    batch: x0, eps (B, T, C)[, mask (B, T)] and whatever else its predictions need; extract (B, T, C) ->
    (B, T, F); mean (F,): of extract over the data set, or None; kind: of SIGNALS."""

    def __init__(self, batch: dict, extract, mean: Tensor | None, kind: str):
        self.batch = {name: x[:10] for name, x in batch.items()}
        self.extract, self.mean, self.kind = extract, mean, kind
        self.target = extract(self.batch["x0"])

    def __call__(self, predict, full: bool = False) -> dict:
        """-> D (the number whose slope is taken) and D_of {prediction: D}; full: of all PREDICTIONS, else of
        those that the signal needs. predict: see predicted."""
        names = PREDICTIONS if full else [name.removesuffix("-pooled") for name in SIGNALS[self.kind]]
        x0, eps, mask = self.batch["x0"], self.batch["eps"], self.batch.get("mask")
        D = probe(predict, self.extract, x0, eps, names, self.mean, self.target, mask)
        return {"D": signal(self.kind, D), "D_of": D}


# --- its slope ----------------------------------------------------------------------------------------------

def probe_steps(K: int) -> list[int]:
    """Steps k_j = round(32 * 2^(j/4)) up to K.  # ASSUMED"""
    doublings = int(np.ceil(np.log2(max(K, FIRST) / FIRST)))
    j = np.arange(PER_DOUBLING * doublings + 1)
    steps = np.round(FIRST * 2 ** (j / PER_DOUBLING)).astype(int)
    return sorted({k for k in steps.tolist() if k <= K})


def slope(k, D) -> tuple[float, float]:
    """-(least-squares slope of D on k^(1/3)), positive when D falls, and its standard error. k, D: n >= 3."""
    fit = scipy.stats.linregress(np.asarray(k, float) ** POWER, np.asarray(D, float))
    return float(-fit.slope), float(fit.stderr)


# --- the regime ---------------------------------------------------------------------------------------------

class Regime:
    """r from one of five sources; its state is the list of probes (k, D). K: planned steps.

    slope        update(k, D) at the probe steps, those where probe_index(k) is not None
    loss         the same, D = mean since the last probe of the losses that observe(loss) is given each step
    agreement    update(k, cosine of the gradients of guidance and flow matching) at every second probe step;
                 r = 1 - e / (largest e since the third), e = EMA(cosine); once guidance is off, r stays
    clock        r = k / K                               # agreement: ASSUMED; cosine: HASTE, arXiv 2505.16792
    replay:FILE  r of another run, from its log.jsonl

    ValueError for an unknown source or a file without r."""

    def __init__(self, source: str, K: int):
        self.source, _, path = source.partition(":")
        if self.source not in SOURCES or (self.source == "replay") != bool(path) or source.endswith(":"):
            raise ValueError(f"unknown source {source!r}: slope, loss, agreement, clock or replay:FILE")
        self.K = K
        self.steps = {k: j for j, k in enumerate(probe_steps(K))}
        self.replayed = read_r(path) if path else None
        self.k: list[int] = []          # probes so far: step
        self.D: list[float] = []        # and discrepancy, mean loss or cosine
        self.losses = torch.zeros(2)    # [sum, number] of training losses since the last probe
        self.s: float | None = None     # last slope
        self.ref: float | None = None   # largest significant slope, or mean cosine
        self.mean: float | None = None  # moving average of rho, or of cosines
        self.current = 0.0              # r that follows

    def probe_index(self, k: int) -> int | None:
        """j where step k is the probe step k_j, else None; j % 4 == 0 once a doubling."""
        return self.steps.get(k)

    def logged_at(self, k: int) -> bool:
        """Probe steps. Agreement is measured after r was read: r shows it one step later."""
        return k in self.steps or (self.source == "agreement" and k - 1 in self.steps)

    @property
    def no_signal(self) -> bool:
        """True where six probes and 15 % of K brought no significant fall of D: r then follows the clock."""
        return self.ref is None and len(self.k) >= WINDOW and self.k[-1] >= NO_SIGNAL * self.K

    def observe(self, loss: Tensor) -> None:
        """Take the training loss of a step. The sum stays on the loss's device: no synchronization."""
        one_more = torch.stack([loss.detach().float(), torch.ones_like(loss)])
        self.losses = self.losses.to(loss.device) + one_more

    def mean_loss(self) -> float:
        """Mean of the observed losses, which are then forgotten; NaN where there were none."""
        total, n = self.losses.tolist()
        self.losses = torch.zeros(2)
        return total / n if n else float("nan")

    def update(self, k: int, D: float) -> None:
        """Take the probe of step k. ValueError where D is not finite: every later slope would be NaN."""
        if not np.isfinite(D):
            raise ValueError(f"discrepancy at step {k} is {D}")
        self.k.append(int(k))
        self.D.append(float(D))
        if self.source == "agreement":
            self._follow_cosine()
        elif len(self.k) >= WINDOW:
            self._follow_slope()

    def _follow_cosine(self) -> None:
        self.mean = self._moving_average(self.D[-1])
        if len(self.D) >= 3:                               # a single cosine is noise
            self.ref = max(self.ref or 0.0, self.mean)
            self.current = float(np.clip(1 - self.mean / self.ref, 0, 1)) if self.ref > 0 else 1.0

    def _moving_average(self, new: float) -> float:
        """Of rho, or of cosines: the new one counts NEWEST_SHARE."""
        return new if self.mean is None else (1 - NEWEST_SHARE) * self.mean + NEWEST_SHARE * new

    def _follow_slope(self) -> None:
        # Is there a signal? A slope counts if it is far from 0 and not tiny.
        self.s, standard_error = slope(self.k[-WINDOW:], self.D[-WINDOW:])
        width = self.k[-1] ** POWER - self.k[-WINDOW] ** POWER
        least = MIN_RELATIVE * abs(np.mean(self.D[:WINDOW])) / width
        if self.s > MIN_STANDARD_ERRORS * standard_error and self.s > least:
            self.ref = max(self.ref or 0.0, self.s)

        # rho = clip(s / ref, 0, 1): the slope now as a share of the largest; r = 1 - its moving average.
        if self.ref:
            self.mean = self._moving_average(float(np.clip(self.s / self.ref, 0, 1)))
            self.current = 1 - self.mean

    def r(self, k: int) -> float:
        """r at step k, in [0, 1]; between probes the last value holds."""
        if self.source == "replay":
            return float(hold_last(*self.replayed, k))
        if self.source == "clock":
            return min(1.0, k / self.K)
        if self.no_signal:
            return min(1.0, self.k[-1] / self.K)
        return self.current

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
        self.s = self.ref = self.mean = None
        self.current = 0.0
        for k, D in zip(state["k"], state["D"]):
            self.update(k, D)


# --- r of another run ---------------------------------------------------------------------------------------

def read_r(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(steps, r) of a run's log.jsonl; ValueError if it is none, holds no r, or one outside [0, 1]."""
    rows = [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]  # the last is empty or cut
    try:
        pairs = sorted({(int(row["step"]), float(row["r"])) for row in rows if "r" in row})
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: has lines that are none of a run's log") from None
    if not pairs or not all(0 <= r <= 1 for _, r in pairs):
        raise ValueError(f"{path}: holds {'an r outside [0, 1]' if pairs else 'no value of r'}")
    return np.array([k for k, _ in pairs]), np.array([r for _, r in pairs])


def hold_last(steps: np.ndarray, values: np.ndarray, k) -> np.ndarray:
    """values at step(s) k: the last one at or before k, or the first. steps (n,) ascending, values (n,)."""
    return values[np.maximum(0, np.searchsorted(steps, k, side="right") - 1)]


def demo() -> None:
    """r at powers of two on four curves with noise of deviation 0.005."""
    K, rng = 8_192, np.random.default_rng(0)
    curves = {"falls until 512": lambda k: 1 - 0.08 * min(k, 512) ** POWER,
              "falls for ever": lambda k: 2 - 0.08 * k**POWER,
              "flat": lambda k: 0.8,
              "rising": lambda k: 0.5 + 0.02 * k**POWER}
    print("step              " + "".join(f"{2**j:8d}" for j in range(5, 14)))
    final = {}
    for name, curve in curves.items():
        regime, at_powers_of_two = Regime("slope", K), []
        for k in probe_steps(K):
            regime.update(k, curve(k) + 0.005 * rng.standard_normal())
            if np.log2(k) % 1 == 0:
                at_powers_of_two.append(regime.r(k))
        final[name] = at_powers_of_two[-1], regime.no_signal
        print(f"{name:18s}" + "".join(f"{r:8.2f}" for r in at_powers_of_two)
              + "   no signal: the clock" * regime.no_signal)
    assert final["falls until 512"][0] > 0.9 and final["falls for ever"][0] < 0.4
    assert final["flat"][1] and final["rising"][1]


if __name__ == "__main__":
    demo()
