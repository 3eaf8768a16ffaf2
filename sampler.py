"""Which noise levels to train on: the density p(t) of training timesteps. (The ODE sampler is in model.py.)

Idea. Flow matching may draw t from any density with full support; where the draws fall decides what is learnt
first. At high noise (t near 1) the input shows nothing of the sound, so the network must take *what* it is
from the condition; at low noise it refines detail.

    t = sigmoid(m + s z),  z ~ N(0, 1)                       logit-normal: SD3 (arXiv 2403.03206), eq. 19
    p(t) = (1 - u) N(logit t; m, s) / (t (1 - t)) + u        with a uniform floor u      # ASSUMED: u = 0.1
    m(r) = (1 - r) m_early + r m_late                        high noise first            # ASSUMED
    s(r) = (1 - r) s_early + r s_late                                                    # ASSUMED

Modes (train.py --timesteps): `off` is the reference density m = 0, s = 1; `constant` a tuned one, --m and
--s; `adaptive` moves from m_early, s_early to m_late, s_late with the regime r. The direction is that of the
task-difficulty curriculum (arXiv 2403.10348): high noise first. Two peers that know nothing of r, `infonoise`
and `curriculum`, are in parts/peers.py.

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data: a larger m means more noise. Shapes (B,).

Public: LogitNormal (sample(n, generator) -> t, pdf(t)), between.

    python sampler.py         # demo: histograms of a million draws against the exact densities
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.1  # u, share of draws that are uniform: no noise level is ever forgotten


@dataclass(frozen=True)
class LogitNormal:
    """Centre m and width s (logits), uniform floor u; u = 1 is the uniform density. The defaults are the
    reference density, that of the mode `off`."""
    m: float = 0.0
    s: float = 1.0
    u: float = FLOOR

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n timesteps (n,) float32 in (0, 1). The generator is the only randomness.

        Every density draws the same number of random values, so changing it changes t alone."""
        normal = torch.randn(n, generator=generator)
        uniform = torch.rand(n, generator=generator)
        pick = torch.rand(n, generator=generator)
        # t = sigmoid(m + s z), z ~ N(0, 1); uniform with probability u                    # SD3, sec. 3.1
        t = torch.where(pick < self.u, uniform, torch.sigmoid(self.m + self.s * normal))
        # float32 sigmoid reaches 1.0 exactly, where logit t is infinite.
        return t.clamp(1e-5, 1 - 1e-5)

    def pdf(self, t: Tensor) -> Tensor:
        """Exact density at t in (0, 1) (any shape); it integrates to 1."""
        # p(t) = (1 - u) N(logit t; m, s) / (t (1 - t)) + u;  dt = t (1 - t) d logit t      # SD3, eq. 19
        logit = torch.log(t) - torch.log1p(-t)
        normal = torch.exp(-((logit - self.m) ** 2) / (2 * self.s**2)) / (self.s * math.sqrt(2 * math.pi))
        return (1 - self.u) * normal / (t * (1 - t)) + self.u


def between(r: float, early: LogitNormal, late: LogitNormal) -> LogitNormal:
    """The density at regime r in [0, 1]; its floor u is `early`'s."""
    m = (1 - r) * early.m + r * late.m                                                             # ASSUMED
    s = (1 - r) * early.s + r * late.s
    return LogitNormal(m, s, early.u)


def demo() -> None:
    """Share of a million draws in tenths of [0, 1] beside the integral of pdf."""
    generator = torch.Generator().manual_seed(0)
    midpoints = (torch.arange(10_000) + 0.5) / 10_000
    columns, densities = [], (LogitNormal(), LogitNormal(1.0), LogitNormal(1.0, 2.0))
    for density in densities:
        drawn = torch.histc(density.sample(1_000_000, generator), 10, 0, 1) / 1e6
        exact = density.pdf(midpoints).view(10, -1).mean(1) / 10
        assert (drawn - exact).abs().max() < 2e-3, "histogram and density disagree"
        columns.append((drawn, exact))
    print("   t     " + "".join(f"   m = {x.m:.0f}, s = {x.s:.0f}   " for x in densities) + " (drawn, exact)")
    for k in range(10):
        values = "".join(f"{drawn[k]:9.3f} {exact[k]:.3f}    " for drawn, exact in columns)
        print(f"{k / 10:.1f}-{(k + 1) / 10:.1f}  {values}")


if __name__ == "__main__":
    demo()
