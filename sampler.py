"""Which noise levels to train on: the density p(t) of training timesteps.

Idea.  Flow matching may draw t from any density with full support; where the draws fall decides what is learnt first. At high
noise (t near 1) the network sees nothing of the sound and must get *what* it is from the condition; at low noise it polishes.

    t = sigmoid(m + s n),  n ~ N(0, 1)      logit-normal (SD3, eq. 19, m = 0, s = 1)          # moves with the centre m
    p(t) = (1 - u) N(logit t; m, s) / (t (1 - t)) + u      mixed with a uniform floor u       # ASSUMED: u = 0.1, m by measurement

    m(r) = (1 - r) m_early + r m_late      semantics at high noise first, then the tuned constant          # ASSUMED

Modes (train.py --timesteps): `off` is the reference density m = 0; `constant` a tuned centre m > 0 (towards noise); `adaptive` moves
the centre with the regime r. The direction is that of the task-difficulty curriculum (arXiv 2403.10348): high noise first. m_late is
the tuned constant itself: a schedule that ends below a tuned baseline would be compared with a worse one.

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data, so a larger m means more noise. Shapes: (B,).

Public: centre(r, m_early, m_late) -> m; sample(n, m, s, floor, generator) -> t; pdf(t, m, s, floor) -> p(t), exact;
weight(t, m, s, floor) -> p_ref / p.

    python sampler.py         # demo: histogram of a million draws against the exact density
"""
import math

import torch
from torch import Tensor

REFERENCE_M = 0.0  # SD3's logit-normal, the density that `off` means


def centre(r: float, m_early: float, m_late: float) -> float:
    """m(r) = (1 - r) m_early + r m_late; r = 0 acquires semantics, r = 1 refines.  # ASSUMED"""
    return (1 - r) * m_early + r * m_late


def sample(n: int, m: float = REFERENCE_M, s: float = 1.0, floor: float = 0.1, generator: torch.Generator | None = None) -> Tensor:
    """n timesteps (n,) float32 in (0, 1) from the mixture. The generator is the only randomness.

    Every mode consumes the same number of random values, so switching modes changes t and nothing else that is drawn."""
    normal, uniform, pick = torch.randn(n, generator=generator), torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    t = torch.where(pick < floor, uniform, torch.sigmoid(m + s * normal))
    return t.clamp(1e-5, 1 - 1e-5)  # float32 sigmoid reaches 1.0 exactly, where logit t and the weight are infinite


def pdf(t: Tensor, m: float = REFERENCE_M, s: float = 1.0, floor: float = 0.1) -> Tensor:
    """Exact density at t (any shape), integrating to 1 over [0, 1].  # SD3, sec. 3.1: logit-normal density"""
    logit = torch.log(t) - torch.log1p(-t)
    normal = torch.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))
    return (1 - floor) * normal / (t * (1 - t)) + floor


def weight(t: Tensor, m: float, s: float = 1.0, floor: float = 0.1) -> Tensor:
    """Importance weight p_ref(t) / p(t): with it E_p[weight L] = E_ref[L], the loss of the reference density, unbiased.

    Training does not use it: there the shift is meant to change what is learnt. It is for comparing losses measured under different p."""
    return pdf(t, REFERENCE_M, 1.0, floor) / pdf(t, m, s, floor)


def demo() -> None:
    """Share of a million draws in tenths of [0, 1] beside the integral of pdf, for m = 0 and m = 1."""
    g = torch.Generator().manual_seed(0)
    mid = (torch.arange(10_000) + 0.5) / 10_000
    print("   t      m=0 drawn  exact    m=1 drawn  exact")
    cols = []
    for m in (0.0, 1.0):
        drawn = torch.histc(sample(1_000_000, m, generator=g), 10, 0, 1) / 1e6
        exact = pdf(mid, m).view(10, -1).mean(1) / 10
        assert (drawn - exact).abs().max() < 2e-3, "histogram and density disagree"
        cols += [drawn, exact]
    for k in range(10):
        print(f"{k / 10:.1f}-{(k + 1) / 10:.1f}     " + "     ".join(f"{c[k]:.3f}" for c in cols))


if __name__ == "__main__":
    demo()
