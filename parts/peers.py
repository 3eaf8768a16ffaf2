"""Other people's adaptive samplers and regularizers, behind the interfaces of sampler.py and
structure_reg.py: the peers that a reader will ask about. None of them knows the regime r.

Densities of training timesteps (--timesteps):
    curriculum  (arXiv 2603.12517)  logit-normal(0.8, 1), then uniform from a fixed share of the run on
    infonoise   (arXiv 2602.18647)  p(t) in proportion to rho(t) / w(t), the rate at which noise takes away
        information about the sound, from the running loss L(t) alone:
        rho = |d gamma / dt| / 2 * E|x0 - x0_hat|^2, gamma = ((1 - t) / t)^2 the signal-to-noise ratio
        x0 - x0_hat = t (v_hat - v), so the x0 loss is t^2 L(t), and w = 1 / t^2 its weight in L;
        |d gamma / dt| / 2 = (1 - t) / t^3; together:  p(t) ~ t (1 - t) L(t)

Losses on the blocks (--struct-loss), (hs, groups, mask) -> scalar:
    dispersive  (arXiv 2506.09027)  spread the clips of a batch
    diversity   (arXiv 2603.04239)  keep the outputs of all blocks apart

Conventions: t = 1 is pure noise. B batch, T tokens, W width, L blocks; hs = [h_0, ..., h_L] (B, T, W).

Public: curriculum, Binned, InfoNoise, dispersive_loss, diversity_loss.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CURRICULUM_M = 0.8   # centre of the curriculum's first density
CURRICULUM_TO = 0.5  # share of the run after which it is uniform (60 of 100 to 150 thousand steps there)
BINS = 20            # of t, in which InfoNoise keeps the running loss
MEMORY = 0.98        # of a bin's running sums, kept at each new sample in that bin
REFRESH = 10         # steps between two of its densities


# --- densities of training timesteps ------------------------------------------------------------------------

def curriculum(k: int, K: int, floor: float) -> tuple[float, float, float]:
    """(m, s, u) of a logit-normal with a uniform floor at step k of K: noise-biased, then uniform (u = 1).
    # arXiv 2603.12517; the floor and the share of the run: ASSUMED"""
    return (CURRICULUM_M, 1.0, floor if k <= CURRICULUM_TO * K else 1.0)


@dataclass(frozen=True)
class Binned:
    """Piecewise constant: shares (n,) of equal bins of [0, 1], with a uniform floor u."""
    shares: tuple[float, ...]
    u: float

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n timesteps (n,) float32 in (0, 1): a bin by its share, then a place in it."""
        normal = torch.randn(n, generator=generator)       # as many values as a logit-normal draws
        uniform = torch.rand(n, generator=generator)
        pick = torch.rand(n, generator=generator)
        ends = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)
        which = torch.special.ndtr(normal.double()) * ends[-1]             # uniform in [0, 1]
        k = torch.searchsorted(ends, which).clamp_max(len(ends) - 1)
        t = torch.where(pick < self.u, uniform, (k + uniform).float() / len(ends))
        return t.clamp(1e-5, 1 - 1e-5)

    def pdf(self, t: Tensor) -> Tensor:
        """Exact density at t (any shape)."""
        shares = torch.tensor(self.shares, device=t.device)
        k = (t * len(shares)).long().clamp_max(len(shares) - 1)
        return (1 - self.u) * (shares / shares.sum())[k] * len(shares) + self.u


class InfoNoise:
    """The density that the running loss asks for, without a teacher.  # arXiv 2602.18647

    Until every bin has been drawn it is `first`. Its gate at low noise is left out: here t (1 - t) L(t) goes
    to 0 there by itself, since L is bounded."""

    def __init__(self, first):
        self.density = self.first = first                  # a density with a floor u
        self.sums = torch.zeros(2, BINS)                   # of losses, and of their weights

    def observe(self, t: Tensor, loss: Tensor, k: int) -> None:
        """Timesteps (B,) of step k and the velocity loss of each (B,), from all devices."""
        t, loss = t.detach().cpu(), loss.detach().float().cpu()
        which = (t * BINS).long().clamp_max(BINS - 1)
        drawn = torch.bincount(which, minlength=BINS)
        self.sums *= MEMORY**drawn
        self.sums += torch.stack([torch.bincount(which, loss, BINS), drawn])
        if k % REFRESH == 0:
            self.refresh()

    def refresh(self) -> None:
        if self.sums[1].min() == 0:
            return
        # p(t) ~ rho / w = t (1 - t) L(t)                                          # I-MMSE, above
        t = (torch.arange(BINS) + 0.5) / BINS
        rate = t * (1 - t) * self.sums[0] / self.sums[1]
        self.density = Binned(tuple((rate / rate.sum()).tolist()), self.first.u)

    def state_dict(self) -> dict:
        return {"sums": self.sums.clone(), "shares": getattr(self.density, "shares", None)}

    def load_state_dict(self, state: dict) -> None:
        self.sums = state["sums"]
        self.density = Binned(tuple(state["shares"]), self.first.u) if state["shares"] else self.first


# --- losses on the blocks -----------------------------------------------------------------------------------

def dispersive_loss(hs: list[Tensor], groups=None, mask: Tensor | None = None, tau: float = 0.5) -> Tensor:
    """Spread the clips' representations at a quarter of the depth.

    log mean_ij exp(-|z_i - z_j|^2 / (dim z tau)), z a clip's tokens flattened: scalar in [-log B, 0].
    # Dispersive loss, InfoNCE-L2 (arXiv 2506.09027)"""
    h = hs[max(1, (len(hs) - 1) // 4)].float()
    z = (h if mask is None else h * mask[..., None]).flatten(1)    # (B, T W)
    square = z.square().sum(1)
    distance = (square[:, None] + square[None] - 2 * z @ z.T).clamp_min(0) / (z.shape[1] * tau)
    return torch.logsumexp(-distance.flatten(), 0) - 2 * np.log(len(z))


def diversity_loss(hs: list[Tensor], groups=None, mask: Tensor | None = None) -> Tensor:
    """Keep the outputs of all blocks apart. Scalar in [-.5, 1].

    Mean over pairs of blocks of half cos(mean h_l, mean h_m), means over clips and tokens, and half |mean
    cos(h_l, h_m)| over clips and tokens.  # DiverseDiT (arXiv 2603.04239), without its third term, a variance
    over channels, and its long residuals"""
    h = torch.stack([h.float() for h in hs[1:]])                   # (L, B, T, W)
    real = torch.ones(h.shape[1:3], device=h.device) if mask is None else mask.float()     # (B, T)
    n, pairs = real.sum(), torch.triu_indices(len(h), len(h), 1)
    centres = F.normalize(torch.einsum("lbtw,bt->lw", h, real) / n, dim=-1, eps=1e-6)
    unit = F.normalize(h, dim=-1, eps=1e-6) * real[None, :, :, None]
    between_means = centres @ centres.T                            # (L, L)
    between_tokens = (unit.flatten(1) @ unit.flatten(1).T / n).abs()
    return 0.5 * (between_means + between_tokens)[pairs[0], pairs[1]].mean()
