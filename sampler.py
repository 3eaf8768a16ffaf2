"""Which noise levels to train on: the density p(t) of training timesteps. (The ODE sampler is in model.py.)

Idea. Flow matching may draw t from any density with full support; where the draws fall decides what is learnt
first. At high noise (t near 1) the input shows nothing of the sound, so the network must take *what* it is
from the condition; at low noise it refines detail.

    t = sigmoid(m + s n),  n ~ N(0, 1)                       logit-normal: SD3 (arXiv 2403.03206), eq. 19
    p(t) = (1 - u) N(logit t; m, s) / (t (1 - t)) + u        with a uniform floor u      # ASSUMED: u = 0.1
    m(r) = (1 - r) m_early + r m_late                        high noise first            # ASSUMED

Modes (train.py --timesteps): `off` is the reference density m = 0; `constant` a tuned centre m > 0 (towards
noise); `adaptive` moves the centre with the regime r (train.drive). The direction is that of the
task-difficulty curriculum (arXiv 2403.10348): high noise first. m_late is the m of `constant`, 1.5, and
m_early is 2.0: the two differ in how they begin, so the schedule is compared with its own tuned end.

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data: a larger m means more noise. Shapes (B,).

Public: centre(r, m_early, m_late) -> m; sample(n, m, s, floor, generator) -> t; pdf(t, m, s, floor) -> p(t).

    python sampler.py         # demo: histogram of a million draws against the exact density
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

REFERENCE_M = 0.0  # SD3's logit-normal, the density that `off` means
REFERENCE_S = 1.0
FLOOR = 0.1        # u, share of draws that are uniform: no noise level is ever forgotten


def centre(r: float, m_early: float, m_late: float) -> float:
    """m(r): the density's centre, a logit, at regime r in [0, 1]."""
    # m(r) = (1 - r) m_early + r m_late                                                            # ASSUMED
    return (1 - r) * m_early + r * m_late


def sample(n: int, m: float = REFERENCE_M, s: float = REFERENCE_S, floor: float = FLOOR,
           generator: torch.Generator | None = None) -> Tensor:
    """n timesteps (n,) float32 in (0, 1) from the mixture. The generator is the only randomness.

    Every mode consumes as many random values: switching modes changes t and nothing else that is drawn."""
    normal = torch.randn(n, generator=generator)
    uniform = torch.rand(n, generator=generator)
    pick = torch.rand(n, generator=generator)
    # t = sigmoid(m + s n), or uniform with probability `floor`                         # SD3, eq. 19
    t = torch.where(pick < floor, uniform, torch.sigmoid(m + s * normal))
    # float32 sigmoid reaches 1.0 exactly, where logit t is infinite.
    return t.clamp(1e-5, 1 - 1e-5)


def pdf(t: Tensor, m: float = REFERENCE_M, s: float = REFERENCE_S, floor: float = FLOOR) -> Tensor:
    """Exact density at t (any shape); it integrates to 1 over [0, 1]."""
    # p(t) = (1 - u) N(logit t; m, s) / (t (1 - t)) + u;  dt = t (1 - t) d logit t        # SD3, sec. 3.1
    logit = torch.log(t) - torch.log1p(-t)
    normal = torch.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))
    return (1 - floor) * normal / (t * (1 - t)) + floor


def demo() -> None:
    """Share of a million draws in tenths of [0, 1] beside the integral of pdf, for m = 0 and m = 1."""
    generator = torch.Generator().manual_seed(0)
    midpoints = (torch.arange(10_000) + 0.5) / 10_000
    columns = []
    for m in (0.0, 1.0):
        drawn = torch.histc(sample(1_000_000, m, generator=generator), 10, 0, 1) / 1e6
        exact = pdf(midpoints, m).view(10, -1).mean(1) / 10
        assert (drawn - exact).abs().max() < 2e-3, "histogram and density disagree"
        columns += [drawn, exact]
    print("   t      m=0 drawn  exact    m=1 drawn  exact")
    for k in range(10):
        values = "     ".join(f"{column[k]:.3f}" for column in columns)
        print(f"{k / 10:.1f}-{(k + 1) / 10:.1f}     {values}")


if __name__ == "__main__":
    demo()
