"""SSL guidance: early in training, pull a block's hidden states towards the features of a frozen SSL encoder.

Idea.  A young diffusion transformer must invent a representation of sound before it can use its condition. A
self-supervised teacher phi already has one, and aligning a block with it shortens that. The abstract decays
this guidance ("early semantic bootstrapping") and gives no more detail; here its weight follows the regime r.
(In our runs of super-resolution no effect of ending it at 0.4 K was found: docs/results.md.)

    L_ssl     = mean over tokens of 1 - cos(P(h_l(x_t)), phi_c(x0))             # REPA (2410.06940), eq. 8
                phi_c = phi - its data-set mean; every 4th token a step         # ASSUMED
    lambda(r) = lambda0 (1 - r)^gamma;  nothing is computed once r > 0.9        # ASSUMED

    h_l (B, T, W) --P: Linear, SiLU, Linear, SiLU, Linear--> (B, T, F) --cos--> phi_c (B, T, F) <-- phi <-- x0

Tokens are chosen and phi is centred in train.losses; hs[l] is block l's output, h_0 the embedding. The
teacher is in parts/teacher.py; `--teacher` takes another one.

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the
network predicts v. lambda = 0 is no guidance. B batch, T tokens (25 a second), W model width, F teacher
features, l the aligned block (--align-block, 0.4 L rounded); every 4th token: --guide-every, another quarter
each step. Not to be confused with classifier-free guidance (--guidance-scale), which acts when sampling.

Public: Projector, alignment_loss, ssl_weight, gradient_agreement.

    python guidance.py        # demo: what the loss and its weight do, on features with a known answer
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AGREEMENT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # t of the log's agreement_t (--probe always)
OFF_AT = 0.9  # past this r the branch is not computed at all: decay also buys time


class Projector(nn.Module):
    """P: h (B, T, W) -> (B, T, F). Hidden width 2 W (REPA's 2,048 would cost more than four small blocks).

    Its initial values are drawn under a forked random state: guidance changes nothing else that is drawn."""

    def __init__(self, width: int, features: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 40_000)
            self.net = nn.Sequential(
                nn.Linear(width, 2 * width), nn.SiLU(),
                nn.Linear(2 * width, 2 * width), nn.SiLU(),
                nn.Linear(2 * width, features),
            )

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h)


def alignment_loss(z: Tensor, phi_c: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over clips, of each over its real tokens, of 1 - cos(z, phi_c), scalar in [0, 2]. z (B, T, F):
    P(h_l). phi_c (B, T, F): teacher features less their mean. mask (B, T): True at real tokens. Every clip
    weighs the same, however short (one without real tokens counts as 0), so the gradients of equal parts of a
    batch average to that of the batch.

    phi_c is a target: no gradient reaches the teacher. In float32: bfloat16 rounds 1 - cos to steps of 0.004.
    The cosine is written out because F.cosine_similarity takes half as long again."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        phi_c = F.normalize(phi_c.detach().float(), dim=-1, eps=1e-6)
        # 1 - cos(P(h_l(x_t)), phi_c(x0))                                               # REPA, eq. 8
        distance = 1 - (z * phi_c).sum(-1) / z.norm(dim=-1).clamp_min(1e-6)        # (B, T)
    if mask is None:
        return distance.mean()
    return ((distance * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


def ssl_weight(r: float, lambda0: float, gamma: float = 1.0) -> float:
    """lambda(r), the weight of the alignment loss; exactly 0 past OFF_AT."""
    if r > OFF_AT:
        return 0.0
    # lambda(r) = lambda0 (1 - r)^gamma                                                            # ASSUMED
    return lambda0 * (1 - r) ** gamma


def gradient_agreement(loss_a: Tensor, loss_b: Tensor, params) -> float:
    """Cosine of the two losses' gradients on `params`: positive while they ask for the same, negative while
    they pull against each other. Leaves the graph alive and no .grad touched. # HASTE (arXiv 2505.16792)"""
    flat = []
    for loss in (loss_a, loss_b):
        gradients = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(x) if dx is None else dx for dx, x in zip(gradients, params)]
        flat.append(torch.cat([dx.flatten() for dx in filled]).float())
    return float(F.cosine_similarity(*flat, dim=0, eps=1e-12))


def demo() -> None:
    """Held-out loss: a projector learns features that are a function of h, and not those of other clips."""
    torch.manual_seed(0)
    h = torch.randn(160, 8, 16)
    phi = torch.tanh(h @ torch.randn(16, 12))              # (B, T, F): what a teacher might extract
    for name, target in (("matching targets", phi), ("targets of other clips", phi[torch.randperm(160)])):
        projector, held_out = Projector(16, 12), []
        optimizer = torch.optim.Adam(projector.parameters(), 3e-3)
        for k in range(201):
            loss = alignment_loss(projector(h[:120]), target[:120])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if k % 50 == 0:
                held_out.append(alignment_loss(projector(h[120:]), target[120:]).item())
        print(f"{name:24s}" + "  ".join(f"{x:.3f}" for x in held_out) + "   at steps 0, 50, ... 200")
        assert (held_out[-1] < 0.3) == (target is phi)
    some_r = (0, 0.25, 0.5, 0.75, 0.9, 0.95)
    print("r                       " + "  ".join(f"{r:5.2f}" for r in some_r))
    print("lambda                  " + "  ".join(f"{ssl_weight(r, 0.5):5.2f}" for r in some_r))
    x = torch.randn(5, requires_grad=True)
    agreement = gradient_agreement(x.sin().sum(), -2 * x.sin().sum(), [x])
    print(f"agreement of a loss with its negative: {agreement:.2f}")
    assert ssl_weight(0.95, 0.5) == 0 and abs(agreement + 1) < 1e-5


if __name__ == "__main__":
    demo()
