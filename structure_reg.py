"""Do the blocks of the network fall into groups? And if they do, keep the groups' work apart.

Idea. While a transformer learns, its blocks specialise. When their *weights* have converged to groups (by two
tests that clustering alone cannot pass), a regularizer keeps what different groups add to the residual stream
from pointing the same way.

    1 signatures    A_l = W_O W_V P,  M_l = W_2 W_1 P,  C_l = adaLN weight, of block l           # ASSUMED
                    P = I - 1 1^T / W
    2 similarity    S_lm = mean over A, M, C of cos(block l, block m)  (without C until adaLN has left 0)
    3 beyond_depth  rest = S - fit of (a + b |l-m| + c / |l-m| + d first + e last)               # ASSUMED
    4 group         average linkage on 1 - rest, cut at G groups
    5 contrast      mean within groups less that between them: of S in axes_test, of rest in depth_test
    6 axes_test     p against blocks with permuted and flipped axes: is S grouped at all?
      depth_test    p against shuffled rest, fitted and grouped anew: more than depth explains?
    7 check         accepted: both p <= .05 and the same groups at three checks in a row, each after >= 1 %
                    of weight movement, and then r > 1/2 and p (axes, 199 draws) <= .005         # ASSUMED
    8 grouped_loss  L_struct = mean over clips and pairs of groups of cos^2(U_g, U_h)            # ASSUMED
                    U_g = mean over l in g of u_l, less its mean over the batch;
                    u_l = h_l - h_(l-1), averaged over the clip's tokens
    9 share         mu = q r / ratio, ramped in: |mu grad L_struct| = q r |grad L_fm|            # ASSUMED
                    ratio = |grad L_struct| / |grad L_fm| on the blocks' weights, from the ramp, then held

Why products: W_V -> X W_V, W_O -> W_O X^-1 leaves a head unchanged, and hidden units may be renumbered at
will, so single matrices say nothing; W_O W_V and W_2 W_1 don't change. They read and write the residual
stream, a basis that all blocks share (P: LayerNorm, before adaLN's shift and scale, takes the mean out). W_Q
and W_K stay out: QK-norm makes their scale meaningless.

Why two tests: clustering always returns G groups, and weights that hardly move return the same ones at each
check. *Axes*: in the null each block's residual axes are permuted and flipped at random: each block stays
what it is, what it has in common with others is lost. (One direction that all blocks share is no group: the
leading singular pair of the mean signature is projected out first.) *Depth*: we take it that depth alone
makes neighbours alike, the first and last block unlike the others; groups that this explains do not pass.

Conventions: t in [0, 1], t = 1 is pure noise, t = 0 is data; r = 0 acquires semantics, r = 1 refines. B
batch, T tokens, W width, L blocks, G groups, R = 6 W outputs of a block's adaLN; q: --struct-share; L_fm:
model.flow_matching_loss. hs = [h_0, ..., h_L] (B, T, W): the embedding, then each block's output.

Public: signatures, similarity, beyond_depth, group, axes_test, depth_test, GroupDetector, grouped_loss,
depth_groups, share, gradient_ratio. Two peers of grouped_loss are in parts/peers.py.

    python structure_reg.py   # demo: planted groups are found, random blocks and depth have none
"""
from __future__ import annotations

import functools

import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS, ALPHA = 39, 0.05  # of the null; the smallest reachable p is 1 / 40
# Successive checks see almost the same weights: of 200 runs with random blocks a streak alone accepted 19,
# with the finer null besides 12 at p <= .01, 6 at p <= .005 (results/log.md, "how often does chance latch?").
STREAK, CONFIRM_DRAWS, CONFIRM_ALPHA = 3, 199, 0.005
ACCEPT_FROM = 0.5        # r from which groups are accepted: before, semantics are still being learnt
MOVED = 0.01             # relative weight movement that makes a check worth having
C_FLOOR = 1e-3           # RMS of every C_l before it counts: adaLN starts at zero, where a cosine is noise
DEPTH_DRAWS = 199        # of the second null, which is cheap
TESTABLE = 6             # blocks: five have ten pairs, and the model of depth five numbers, too few to test


# --- what a block is ----------------------------------------------------------------------------------------

def signatures(blocks) -> list:
    """Weights of each block -> [A (L, W, W), M (L, W, W)(, C (L, R, W))], float32, unit norm each.

    blocks: [(W_O (W, W), W_V (W, W), W_1 (4 W, W), W_2 (W, 4 W), C (R, W)) per block]. The direction that all
    blocks share is projected out. Arrays, or tensors where the weights are on a GPU."""
    wo, wv, w1, w2, c = (torch.stack([block[k].detach().float() for block in blocks]) for k in range(5))
    # A_l = W_O W_V P,  M_l = W_2 W_1 P                                                            # ASSUMED
    parts = [x - x.mean(-1, keepdim=True) for x in (wo @ wv, w2 @ w1)]
    if c.square().mean((1, 2)).sqrt().min() > C_FLOOR:
        parts.append(c)
    parts = [_unit(_without_common(_unit(x))) for x in parts]
    return parts if wo.is_cuda else [x.cpu().numpy() for x in parts]


def _unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)


def _without_common(x: Tensor) -> Tensor:
    """Project the leading singular pair (u, v) of mean_l x_l out of every x_l (L, R, W)."""
    # Power iteration: deterministic, and one pair is enough.
    mean = x.mean(0)                                       # (R, W)
    v = mean[mean.norm(dim=1).argmax()]                    # (W,)
    for _ in range(30):
        v = F.normalize(mean.T @ (mean @ v), dim=0, eps=1e-12)
    u = F.normalize(mean @ v, dim=0, eps=1e-12)            # (R,)
    # (I - u u^T) x_l (I - v v^T)
    x = x - u[:, None] * (u @ x)[:, None, :]
    return x - (x @ v)[:, :, None] * v


def similarity(parts: list) -> np.ndarray:
    """S (L, L): mean over the parts, [(L, R, W), ...] of unit norm, of the cosines between blocks."""
    flat = [x.reshape(len(x), -1) for x in parts]
    return np.mean([torch.as_tensor(x @ x.T).cpu().numpy().astype(np.float64) for x in flat], axis=0)


# --- do they group? -----------------------------------------------------------------------------------------

def group(S: np.ndarray, G: int = 3) -> np.ndarray:
    """Labels (L,) of G clusters by average linkage on 1 - S, numbered by first appearance."""
    off_diagonal = 1 - np.eye(len(S))
    distance = scipy.spatial.distance.squareform(np.clip(1 - S, 0, 2) * off_diagonal, checks=False)
    tree = scipy.cluster.hierarchy.linkage(distance, "average")
    labels = scipy.cluster.hierarchy.fcluster(tree, G, "maxclust").tolist()
    order = list(dict.fromkeys(labels))
    return np.array([order.index(label) for label in labels])


def contrast(S: np.ndarray, labels: np.ndarray) -> float:
    """Mean similarity S (L, L) of different blocks within groups, labels (L,), minus that between groups."""
    same, different_block = labels[:, None] == labels[None], ~np.eye(len(S), dtype=bool)
    if not (same & different_block).any() or same.all():
        return 0.0
    return float(S[same & different_block].mean() - S[~same].mean())


def axes_test(parts: list, G: int, seed, draws: int = DRAWS) -> float:
    """p of the contrast of S's own clusters against blocks whose residual axes are permuted and flipped
    independently, then reclustered. seed: of the null alone, an int or a sequence of ints."""
    rng, (L, _, width) = np.random.default_rng(seed), parts[0].shape
    stack = torch.stack if isinstance(parts[0], Tensor) else np.stack      # on a GPU; on a CPU
    observed, reached = _found_contrast(parts, G), 0
    for _ in range(draws):
        # One relabelling of the residual stream a block, the same for its A, M and C.
        axes = [(rng.permutation(width), rng.choice(np.float32([-1, 1]), width)) for _ in range(L)]
        if stack is torch.stack:
            axes = [[torch.as_tensor(values, device=parts[0].device) for values in how] for how in axes]
        scrambled = [stack([_relabel(block, *how) for block, how in zip(x, axes)]) for x in parts]
        reached += _found_contrast(scrambled, G) >= observed
    return (1 + reached) / (1 + draws)


@functools.cache
def _depth_model(L: int) -> tuple:
    """(i, j (pairs,), regressors (pairs, 5), their pseudoinverse) of the pairs of L blocks."""
    i, j = np.triu_indices(L, 1)
    apart = (j - i).astype(float)
    depth = np.stack([np.ones_like(apart), apart, 1 / apart, i == 0, j == L - 1], 1)
    return i, j, depth, np.linalg.pinv(depth)


def beyond_depth(S: np.ndarray) -> np.ndarray:
    """What a model of depth leaves of S (L, L): the similarity that is grouped. S itself below six blocks."""
    L = len(S)
    if L < TESTABLE:
        return S
    i, j, depth, inverse = _depth_model(L)
    # S_lm = a + b |l - m| + c / |l - m| + d (first block) + e (last block) + the rest             # ASSUMED
    rest = np.eye(L)
    rest[i, j] = rest[j, i] = S[i, j] - depth @ (inverse @ S[i, j])
    return rest


def depth_test(S: np.ndarray, G: int, seed, draws: int = DEPTH_DRAWS) -> float:
    """p of contrast(rest, its groups) / standard deviation of rest's pairs, rest = beyond_depth(S), S (L, L).

    In the null the pairs of rest are shuffled, the model of depth is taken out of them again, and what is
    left is grouped again. 1.0 for fewer than six blocks. seed: as in axes_test."""
    rng, L = np.random.default_rng(seed), len(S)
    if L < TESTABLE:
        return 1.0
    i, j = np.triu_indices(L, 1)

    def standardized_contrast(matrix: np.ndarray) -> float:
        return contrast(matrix, group(matrix, G)) / matrix[i, j].std()

    rest, reached = beyond_depth(S), 0
    observed = standardized_contrast(rest)
    for _ in range(draws):
        shuffled = np.eye(L)
        shuffled[i, j] = shuffled[j, i] = rng.permutation(rest[i, j])
        reached += standardized_contrast(beyond_depth(shuffled)) >= observed
    return (1 + reached) / (1 + draws)


def _found_contrast(parts: list, G: int) -> float:
    """Contrast of the clusters of S itself, depth left in."""
    S = similarity(parts)
    return contrast(S, group(S, G))


def _relabel(block, order, sign):
    """One block's signature (R, W), array or tensor, with its residual axes permuted and flipped."""
    rows, width = block.shape
    # C (6 W, W) is six outputs (W, W): the rows of each alike. Only A and M also read the stream.
    out = (block.reshape(-1, width, width)[:, order] * sign[:, None]).reshape(block.shape)
    if rows == width:
        return out[:, order] * sign
    return out


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two labellings (L,); 1: the same, 0: chance.  # Hubert & Arabie 1985, eq. 5"""
    table = np.array([[np.sum((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)], float)
    # Pairs of blocks that share a group: in both labellings, in a, in b.
    both, rows, columns = ((n * (n - 1) / 2).sum() for n in (table, table.sum(1), table.sum(0)))
    expected, most = rows * columns / (len(a) * (len(a) - 1) / 2), (rows + columns) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


class GroupDetector:
    """Accepts groups of blocks once they have converged; later groups replace them only once they have
    converged too.

    Call `check` at intervals; `groups` is None until the first acceptance, at step `activated_at`.
    G = 3, but 2 below six blocks: of four, three groups would hold only one pair. `ratio` is the moving
    geometric mean of gradient_ratio, None before the first (`take_ratio`)."""

    def __init__(self, depth: int, seed: int = 0):
        self.G, self.seed = max(2, min(3, depth // 2)), seed
        self.checked_weights: Tensor | None = None  # a fixed sample of the weights at the last check
        self.labels: list[int] | None = None        # groups found at the last check
        self.streak = 0                             # significant checks in a row with the same groups
        self.checks = 0
        self.activated_at: int | None = None
        self.groups: list[int] | None = None        # accepted groups
        self.ratio: float | None = None

    def check(self, k: int, blocks, r: float) -> dict | None:
        """Compare the blocks at step k and regime r -> {S, groups, p, p_depth, contrast, rand_index, streak,
        accepted}, or None where the weights moved less than 1 % since the last check (frozen ones would
        confirm themselves for ever)."""
        # Have the weights moved? Every 61st one tells, and is small in a checkpoint.
        weights = torch.cat([w.detach().float().flatten()[::61].cpu() for block in blocks for w in block])
        if self.checked_weights is not None:
            movement = (weights - self.checked_weights).norm()
            if movement < MOVED * self.checked_weights.norm():
                return None
        self.checked_weights, self.checks = weights, self.checks + 1

        # The labels are clusters of rest, what depth leaves of S. Tests: is S grouped at all (axes)? Is rest
        # (depth)? Then: are the labels those of the last check?
        parts = signatures(blocks)
        S = similarity(parts)
        rest = beyond_depth(S)
        labels = group(rest, self.G)
        p = axes_test(parts, self.G, [self.seed, self.checks])
        p_depth = depth_test(S, self.G, [self.seed, self.checks, 2])
        rand = 0.0 if self.labels is None else rand_index(labels, np.array(self.labels))
        if max(p, p_depth) > ALPHA:
            self.streak = 0
        else:
            self.streak = self.streak + 1 if rand == 1 else 1
        self.labels = labels.tolist()

        # Three times in a row, and semantics are there: accepted, if they beat a finer null as well.
        if self.streak >= STREAK and r > ACCEPT_FROM and self.labels != self.groups:
            if axes_test(parts, self.G, [self.seed, self.checks, 1], CONFIRM_DRAWS) <= CONFIRM_ALPHA:
                self.activated_at = k if self.activated_at is None else self.activated_at
                self.groups = self.labels
        return {"S": S.round(4).tolist(), "groups": self.labels, "p": p, "p_depth": p_depth,
                "contrast": contrast(rest, labels), "rand_index": rand, "streak": self.streak,
                "accepted": self.groups is not None}

    def take_ratio(self, ratio: float) -> None:
        """A measurement of gradient_ratio. Single batches scatter: it counts one half in a geometric mean."""
        self.ratio = ratio if self.ratio is None else (self.ratio * ratio) ** 0.5

    def state_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("G", "seed")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def depth_groups(L: int, G: int) -> list[int]:
    """Groups that need no detection, runs of neighbours: first, middle, last for G = 3 (mode `constant`)."""
    return [block * G // L for block in range(L)]


# --- the loss: (hs, groups, mask) -> scalar -----------------------------------------------------------------

def grouped_loss(hs: list[Tensor], groups, mask: Tensor | None = None, eps: float = 1e-3) -> Tensor:
    """Mean cos^2 between what groups of blocks add to the stream, hs (L + 1) x (B, T, W): scalar in [0, 1].

    Increments, because the h themselves are all alike; batch-centred, because what is added to every clip is
    no sign of shared work; norms as sqrt(|u|^2 + eps^2), because adaLN-zero blocks start with u = 0, where a
    plain cosine has no gradient but NaN."""
    # u_l = h_l - h_(l-1), token-pooled
    pooled = torch.stack([_token_mean(h, mask) for h in hs])       # (L + 1, B, W)
    u = pooled[1:] - pooled[:-1]                                   # (L, B, W)
    # U_g = mean over l in g of u_l, less its mean over the batch, as a unit vector
    averaging = _averages_of_groups(tuple(groups), u.device)       # (G, L)
    U = torch.einsum("gl,lbd->bgd", averaging, u - u.mean(1, keepdim=True))
    U = U / (U.square().sum(-1, keepdim=True) + eps**2).sqrt()     # (B, G, W)
    # L_struct = mean over clips and pairs of groups of cos^2(U_g, U_h)                            # ASSUMED
    cos = U @ U.mT                                                 # (B, G, G)
    others = 1 - torch.eye(len(averaging), device=u.device)
    return (cos.square() * others).sum() / (others.sum() * len(cos))


@functools.cache  # a GPU would have to be waited for if the table were copied to it each time
def _averages_of_groups(groups: tuple, device) -> Tensor:
    """(G, L): what each block counts in the mean over its group; rows sum to 1."""
    names = sorted(set(groups))
    return torch.tensor([[(member == name) / groups.count(name) for member in groups] for name in names],
                        device=device)


def _token_mean(h: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, W) -> (B, W), in float32. A sum, then the division: that way no (B, T, W) float32 array is ever
    written, forward or backward, which halves what the loss costs."""
    if mask is None:
        return h.sum(1, dtype=torch.float32) / h.shape[1]
    return (h * mask[..., None]).sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp_min(1)


# --- its weight ---------------------------------------------------------------------------------------------

def share(r: float, q: float, k: int, activated_at: int | None, ramp: int) -> float:
    """The share of the flow-matching gradient that the structure loss is to have at step k: q r, ramped in
    over `ramp` steps from the acceptance of groups; 0 before."""
    if activated_at is None:
        return 0.0
    return q * r * min(1.0, (k - activated_at) / max(1, ramp))


def gradient_ratio(fm: Tensor, struct: Tensor, params) -> float:
    """|grad L_struct| / |grad L_fm| on `params`: the share that weight 1 would have. Leaves the graph alive
    and no .grad touched.

    A weight that is set by hand can be next to nothing, and then tests nothing (docs/results.md); a
    constant one diverges in DiverseDiT (table 8)."""
    norms = []
    for loss in (struct, fm):
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([g.float().norm() for g in found if g is not None]).norm())
    return float(norms[0] / norms[1].clamp_min(1e-12))


# --- demo ---------------------------------------------------------------------------------------------------

def demo_blocks(L: int, G: int, width: int = 32, shared: float = 0.5, seed: int = 0) -> list[tuple]:
    """L random blocks; those of a group (block % G) have weights in common (share of the variance: `shared`),
    each rewritten in a way that leaves its function as it is."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((width, width), (width, width), (4 * width, width), (width, 4 * width), (6 * width, width))
    common = [[torch.randn(*shape, generator=generator) for shape in shapes] for _ in range(G)]
    blocks = []
    for block in range(L):
        wo, wv, w1, w2, c = (shared**0.5 * a + (1 - shared) ** 0.5 * torch.randn(*shape, generator=generator)
                             for a, shape in zip(common[block % G], shapes))
        x = torch.randn(width, width, generator=generator) + 3 * torch.eye(width)
        order = torch.randperm(4 * width, generator=generator)
        blocks.append((wo @ torch.linalg.inv(x), x @ wv, w1[order], w2[:, order], c))
    return blocks


def demo() -> None:
    """p and recovered groups of planted and of random blocks, and of a similarity that is depth alone."""
    print("blocks           p (axes)  p (depth)   adjusted Rand index with the plan")
    for L, shared in ((8, 0.6), (12, 0.6), (8, 0.0), (12, 0.0)):
        parts = signatures(demo_blocks(L, 3, shared=shared, seed=L))
        S = similarity(parts)
        p, p_depth = axes_test(parts, 3, 0), depth_test(S, 3, 0)
        recovered = rand_index(group(beyond_depth(S)), np.arange(L) % 3)
        print(f"{'planted' if shared else 'random'}, {L:<6d} {p:7.3f} {p_depth:10.3f}     {recovered:+.2f}")
        assert (max(p, p_depth) <= ALPHA and recovered == 1) if shared else p > ALPHA
    place = np.arange(8)
    S = np.exp(-np.abs(place[:, None] - place) / 2) + 0.01 * np.random.default_rng(0).standard_normal((8, 8))
    p_depth = depth_test((S + S.T) / 2, 3, 0)
    print(f"neighbours alike, 8 {p_depth:14.3f}")
    assert p_depth > ALPHA


if __name__ == "__main__":
    demo()
