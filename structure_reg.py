"""Do the blocks of the network fall into groups? And if they have, keep the groups' work apart.

Idea.  While a transformer learns, its blocks specialise. When their *weights* have settled into groups (by a test that clustering
alone cannot pass), a regularizer keeps what different groups add to the residual stream from pointing the same way.

    A_l = W_O W_V P,  M_l = W_2 W_1 P,  C_l = adaLN weight;  P = I - 1 1^T / D            signature of block l     # ASSUMED
    S_lm = mean over the three of cos(., .)  --average linkage on 1 - S-->  G groups, contrast = mean S within - between
    active once p <= .05 and the groups are the same at three checks, each after >= 1 % of weight movement, and at the third also
        p <= .005 against a finer null of 199 draws                                                                        # ASSUMED
    L_struct = mean over clips and pairs of groups of cos^2(U_g, U_h),  U_g = mean over l in g of u_l,
        u_l = h_l - h_(l-1), averaged over the clip's tokens, less its mean over the batch                                 # ASSUMED

Why products: W_V -> X W_V, W_O -> W_O X^-1 leaves a head unchanged, and hidden units may be renumbered at will, so single matrices
say nothing; W_O W_V and W_2 W_1 don't move. They read and write the residual stream, a basis that all blocks share (P: LayerNorm
takes the mean direction out). W_Q and W_K stay out: QK-norm makes their scale meaningless. Why a null: clustering always returns G
groups, and random weights are always stable. Here each block's residual axes are permuted and flipped at random: everything a
block is stays, what it shares with the others goes. One direction that all blocks share (a large residual channel) is no group
either, so the leading singular pair of the mean signature is projected out first.

Conventions: t in [0, 1], t = 1 is pure noise, t = 0 is data; r = 0 acquires semantics, r = 1 refines. B batch, T tokens, D width,
L blocks, G groups; of a block, H hidden units of its MLP, R = 6 D outputs of its adaLN. hs = [h_0, ..., h_L] (B, T, D): the embedding,
then each block's output. Weight 0 is no regularization.

Public: signatures, similarity, group, null_test, Structure (the latch), grouped_loss, dispersive_loss, weight.

    python structure_reg.py   # demo: planted groups are found although each block's weights are rewritten (W_V -> X W_V, W_O -> W_O X^-1); random blocks have none
"""
from __future__ import annotations

import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS, ALPHA = 39, 0.05  # smallest reachable p = 1 / 40
STREAK = 3               # checks in a row; neighbours resemble each other, so this alone lets luck in one run of ten through:
CONFIRM, CONFIRM_ALPHA = 199, 0.005  # the last of the three must beat every draw of a finer null: 6 of 200 drifting random runs latch, 12 at .01
MOVED = 0.01             # relative weight movement that makes a check worth having
C_FLOOR = 1e-3           # RMS of every C_l before it counts: adaLN starts at zero, where a cosine is noise


# --- what a block is --------------------------------------------------------------------------------------------------------

def signatures(blocks) -> list[Tensor]:
    """[(W_O (D, D), W_V (D, D), W_1 (H, D), W_2 (D, H), C (R, D)) per block] -> [A (L, D, D), M (L, D, D)(, C (L, R, D))], in float32.

    Unit norm each; the direction that all blocks share is projected out."""
    wo, wv, w1, w2, c = (torch.stack([b[k].detach().float() for b in blocks]) for k in range(5))
    centre = lambda x: x - x.mean(-1, keepdim=True)                # x P
    parts = [centre(wo @ wv), centre(w2 @ w1)]
    if c.square().mean((1, 2)).sqrt().min() > C_FLOOR:
        parts.append(c)
    return [_unit(_without_common(_unit(x))) for x in parts]


def _unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)


def _without_common(x: Tensor, iterations: int = 30) -> Tensor:
    """Project the leading singular pair (u, v) of mean_l x_l out of every x_l (L, R, D): (I - u u^T) x_l (I - v v^T)."""
    mean = x.mean(0)
    v = mean[mean.norm(dim=1).argmax()]                            # (D,); power iteration: deterministic, and one pair is enough
    for _ in range(iterations):
        v = F.normalize(mean.T @ (mean @ v), dim=0, eps=1e-12)
    u = F.normalize(mean @ v, dim=0, eps=1e-12)                    # (R,)
    x = x - u[:, None] * (u @ x)[:, None, :]
    return x - (x @ v)[:, :, None] * v


def similarity(parts: list[Tensor]) -> np.ndarray:
    """S (L, L): mean over the parts of the cosines between blocks."""
    return np.mean([_gram(x.cpu().numpy()) for x in parts], axis=0)


# --- do they group? ---------------------------------------------------------------------------------------------------------

def group(S: np.ndarray, G: int = 3) -> np.ndarray:
    """Labels (L,) of G clusters by average linkage on 1 - S, numbered by first appearance."""
    distance = scipy.spatial.distance.squareform(np.clip(1 - S, 0, 2) * (1 - np.eye(len(S))), checks=False)
    labels = scipy.cluster.hierarchy.fcluster(scipy.cluster.hierarchy.linkage(distance, "average"), G, "maxclust")
    return np.unique(labels, return_index=True)[1].argsort().argsort()[labels - 1]


def contrast(S: np.ndarray, labels: np.ndarray) -> float:
    """Mean similarity of different blocks within groups minus that between groups."""
    same, other = labels[:, None] == labels[None], ~np.eye(len(S), dtype=bool)
    if not (same & other).any() or same.all():
        return 0.0
    return float(S[same & other].mean() - S[~same].mean())


def null_test(parts: list[Tensor], G: int, seed, draws: int = DRAWS) -> float:
    """p of the contrast against blocks whose residual axes are permuted and flipped independently (C: its output axes), reclustered.
    seed: of the null alone, an int or a sequence of ints."""
    rng, parts = np.random.default_rng(seed), [x.cpu().numpy() for x in parts]
    D = parts[0].shape[-1]
    def scrambled(m, perm, sign):
        out = (m.reshape(-1, D, m.shape[1])[:, perm] * sign[:, None]).reshape(m.shape)  # output axes; six times the stream's for C
        return out[:, perm] * sign if len(m) == D else out         # A and M read the stream too: the same axes on the way in
    def draw():
        axes = [(rng.permutation(D), rng.choice(np.float32([-1, 1]), D)) for _ in parts[0]]  # one relabelling of the stream a block
        return [np.stack([scrambled(m, *how) for m, how in zip(x, axes)]) for x in parts]
    value = lambda xs: contrast(S := np.mean([_gram(x) for x in xs], axis=0), group(S, G))
    observed = value(parts)
    null = [value(draw()) for _ in range(draws)]
    return (1 + sum(v >= observed for v in null)) / (1 + draws)


def _gram(x: np.ndarray) -> np.ndarray:
    """Cosines between blocks of unit norm: (L, R, D) -> (L, L)."""
    x = x.reshape(len(x), -1)
    return (x @ x.T).astype(np.float64)


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two labellings; 1 is the same grouping, 0 what chance gives.  # Hubert & Arabie 1985, eq. 5"""
    table = np.array([[np.sum((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)], float)
    pairs = lambda n: (n * (n - 1) / 2).sum()
    both, rows, cols, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), len(a) * (len(a) - 1) / 2
    expected, most = rows * cols / total, (rows + cols) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


class Structure:
    """The latch. `check` at any steps; `groups` is None until the blocks have converged to groups; later groups replace them only once
    they have themselves converged. G = min(3, L // 2): of four blocks, three groups would be one pair."""

    def __init__(self, depth: int, seed: int = 0):
        self.G, self.seed = max(2, min(3, depth // 2)), seed
        self.load_state_dict({"seen": None, "labels": None, "streak": 0, "checks": 0, "latched": None, "groups": None})

    def check(self, k: int, blocks) -> dict | None:
        """Look at the weights at step k -> what was found {S, groups, p, contrast, rand_index, streak}, or None where they have moved
        less than 1 % since the last look (frozen weights would confirm themselves for ever)."""
        now = torch.cat([w.detach().float().flatten()[::61].cpu() for b in blocks for w in b])  # a fixed sample: small in a checkpoint
        if self.seen is not None and (now - self.seen).norm() < MOVED * self.seen.norm():
            return None
        self.seen, self.checks = now, self.checks + 1
        parts = signatures(blocks)
        S = similarity(parts)
        labels = group(S, self.G)
        p = null_test(parts, self.G, [self.seed, self.checks])
        agree = 0.0 if self.labels is None else rand_index(labels, np.array(self.labels))
        self.streak = 0 if p > ALPHA else self.streak + 1 if agree == 1 else 1
        self.labels = labels.tolist()
        if self.streak >= STREAK and self.labels != self.groups and null_test(parts, self.G, [self.seed, self.checks, 1], CONFIRM) <= CONFIRM_ALPHA:
            self.latched, self.groups = k if self.latched is None else self.latched, self.labels
        return {"S": S.round(4).tolist(), "groups": self.labels, "p": p, "contrast": contrast(S, labels), "rand_index": agree, "streak": self.streak}

    STATE = ("seen", "labels", "streak", "checks", "latched", "groups")

    def state_dict(self) -> dict:
        return {k: getattr(self, k) for k in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        for k in self.STATE:
            setattr(self, k, state[k])


# --- the losses, behind one interface: (hs, groups, mask) -> scalar -------------------------------------------------------------

def _pooled(h: Tensor, mask: Tensor | None) -> Tensor:
    """Token mean (B, T, D) -> (B, D), in float32. A sum, then the division: that way no (B, T, D) float32 array is ever written, forward
    or backward, which halves what the loss costs."""
    if mask is None:
        return h.sum(1, dtype=torch.float32) / h.shape[1]
    return (h * mask[..., None]).sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp_min(1)


def grouped_loss(hs: list[Tensor], groups, mask: Tensor | None = None, eps: float = 1e-3) -> Tensor:
    """Mean cos^2 between what different groups of blocks add to the stream: scalar in [0, 1].  # ASSUMED

    Increments, because the h themselves are all alike; batch-centred, because what is added to every clip is no sign of shared work;
    norms as sqrt(|u|^2 + eps^2), because adaLN-zero blocks start with u = 0, where a plain cosine has no gradient but NaN."""
    pooled = torch.stack([_pooled(h, mask) for h in hs])           # (L + 1, B, D)
    u = pooled[1:] - pooled[:-1]                                   # (L, B, D)
    names = sorted(set(groups))
    M = torch.tensor([[(g == n) / list(groups).count(n) for g in groups] for n in names], device=u.device)  # (G, L): means over a group's blocks
    U = torch.einsum("gl,lbd->bgd", M, u - u.mean(1, keepdim=True))
    U = U / (U.square().sum(-1, keepdim=True) + eps**2).sqrt()
    cos = U @ U.mT                                                 # (B, G, G)
    others = 1 - torch.eye(len(names), device=u.device)
    return (cos.square() * others).sum() / (others.sum() * len(cos))


def dispersive_loss(hs: list[Tensor], groups=None, mask: Tensor | None = None, tau: float = 0.5) -> Tensor:
    """log mean_ij exp(-|z_i - z_j|^2 / (dim z tau)) of one block at a quarter of the depth, z a clip's tokens flattened: scalar in
    [-log B, 0]. The reference peer; it looks at no groups.  # Dispersive loss, InfoNCE-L2 (arXiv 2506.09027)"""
    h = hs[max(1, (len(hs) - 1) // 4)].float()
    z = (h if mask is None else h * mask[..., None]).flatten(1)
    square = z.square().sum(1)
    distance = (square[:, None] + square[None] - 2 * z @ z.T).clamp_min(0) / (z.shape[1] * tau)
    return torch.logsumexp(-distance.flatten(), 0) - 2 * np.log(len(z))


LOSSES = {"grouped": grouped_loss, "dispersive": dispersive_loss}


def by_depth(L: int, G: int) -> list[int]:
    """Groups that need no discovery: first, middle, last (the `constant` mode)."""
    return [l * G // L for l in range(L)]


def weight(r: float, mu0: float, k: int, latched: int | None, ramp: int) -> float:
    """mu = mu0 r, ramped in over `ramp` steps from the latch; 0 before.  # ASSUMED; a constant weight diverges in DiverseDiT, table 8"""
    return 0.0 if latched is None else mu0 * r * min(1.0, (k - latched) / max(1, ramp))


def demo_blocks(L: int, G: int, D: int = 32, shared: float = 0.5, seed: int = 0) -> list[tuple]:
    """L random blocks; those of a group (l % G) share a circuit (share of the variance: `shared`), each block's weights rewritten in a way that leaves its function as it is."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g)
    shapes, out = ((D, D), (D, D), (4 * D, D), (D, 4 * D), (6 * D, D)), []
    common = [[randn(*s) for s in shapes] for _ in range(G)]
    for l in range(L):
        wo, wv, w1, w2, c = (shared**0.5 * a + (1 - shared) ** 0.5 * randn(*s) for a, s in zip(common[l % G], shapes))
        x, perm = randn(D, D) + 3 * torch.eye(D), torch.randperm(4 * D, generator=g)
        out.append((wo @ torch.linalg.inv(x), x @ wv, w1[perm], w2[:, perm], c))
    return out


def demo() -> None:
    """p and recovered groups of planted and of random blocks."""
    print("blocks             p     adjusted Rand index with the plan")
    found = {}
    for name, L, shared in (("planted, 8", 8, 0.6), ("planted, 12", 12, 0.6), ("random, 8", 8, 0.0), ("random, 12", 12, 0.0)):
        parts = signatures(demo_blocks(L, 3, shared=shared, seed=L))
        found[name] = null_test(parts, 3, 0), rand_index(group(similarity(parts)), np.arange(L) % 3)
        print(f"{name:15s} {found[name][0]:.3f}   {found[name][1]:+.2f}")
    assert all((p <= ALPHA and ari == 1) if name.startswith("planted") else p > ALPHA for name, (p, ari) in found.items())


if __name__ == "__main__":
    demo()
