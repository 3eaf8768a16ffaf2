"""Muon, and which optimizer updates which parameter.

Idea.  A weight matrix is updated by the nearest orthogonal matrix to its averaged gradient, so that rare
directions learn as fast as common ones. Everything that is no matrix inside the network stays with AdamW.

    gradients --average, Nesterov--> G = U S V' --three polynomials--> about U V' --> matrix -= step U V'

Sources: Muon, Jordan et al. 2024; update RMS 0.2, as AdamW's: Liu et al. 2025; polynomials: Amsel et al.
2025.

Why not torch.optim.Muon: matrices of one shape (the same one in every block) are orthogonalised together
here, and in three steps instead of five; torch's takes more than twice as long at widths like these.

Public: Muon, rate_factor, make_optimizers.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is replaced by the nearest orthogonal one.

    params: matrices (a, b). lr: the root mean square of an update is about 0.2 lr. weight_decay: decoupled,
    as AdamW's. dtype: of the products; bfloat16 is exact enough, but only where the processor multiplies it:
    on one that must emulate it the update took five times as long as forward and backward pass together."""

    # Odd polynomials a x + b x^3 + c x^5, applied to singular values one after the other. Each is the one
    # that brings what the one before made of [0.01, 1] nearest to 1.                # Amsel et al. 2025
    POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonal(cls, x: Tensor) -> Tensor:
        """(n, a, b) -> about U V' of each x = U S V': singular values above a hundredth of the norm end in
        0.7 to 1.3, which is near enough."""
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x                                            # (n, min, max): a smaller gram
        # Singular values into [0, 1]; 1.01 because they would run away from 1 if rounding put them above it.
        x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)
        for a, b, c in cls.POLYNOMIALS:
            # x <- a x + (b A + c A A) x with A = x x'
            gram = x @ x.mT                                                # (n, min, min)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for params in by_shape.values():
                self._step_together(params, group)

    def _step_together(self, params: list[Tensor], group: dict) -> None:
        """Move matrices of one shape."""
        grads = [param.grad for param in params]
        averages = []
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
            averages.append(self.state[param]["momentum"])

        # m <- beta m + (1 - beta) g, then Nesterov's step ahead: G = beta m + (1 - beta) g
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, averages, group["momentum"])
        updates = self.orthogonal(torch.stack(ahead).to(self.dtype))      # (n, a, b)

        # W <- (1 - lr decay) W - 0.2 lr sqrt(max(a, b)) U V'               # Liu et al. 2025
        step = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-step)


def rate_factor(k: int, steps: int, warmup: int, cool: float = 0.0) -> float:
    """Share of the full learning rate at step k of `steps`, from 1: a linear rise over `warmup` steps, and a
    linear fall over the last `cool` (share) of them, whose last step still moves; cool = 0: none."""
    rise = min(1, k / warmup)
    if not cool:
        return rise
    return rise * min(1.0, (steps + 1 - k) / (cool * steps + 1))


def make_optimizers(model: nn.Module, kind: str, lr: float, muon_lr: float,
                    weight_decay: float, dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """kind adamw: [AdamW]; muon: [AdamW, Muon], or [AdamW] where a model has no such matrix. dtype: of Muon's
    products.

    Muon is made for matrices inside the network: embeddings, what reads t, the head, norms and biases stay
    with AdamW, and so does adaLN (that alone lowered the validation loss by 0.06: results/log.md)."""
    inner, others = [], []
    for name, param in model.named_parameters():
        inside = name.startswith(("blocks.", "text.layers.")) and ".ada." not in name
        if kind == "muon" and param.ndim == 2 and inside:
            inner.append(param)
        else:
            others.append(param)

    fused = next(model.parameters()).device.type != "mps"
    optimizers = [torch.optim.AdamW(others, lr, (0.9, 0.99), weight_decay=weight_decay, fused=fused)]
    if inner:
        optimizers.append(Muon(inner, muon_lr, weight_decay=weight_decay, dtype=dtype))
    return optimizers
