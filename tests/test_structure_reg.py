"""Claims about the blocks' grouping, its test, and the losses."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import structure_reg as S


def gauge(blocks, heads=4, seed=0):
    """The same functions: each head's values changed by a random invertible matrix (undone in W_O), hidden units renumbered."""
    g, out = torch.Generator().manual_seed(seed), []
    for wo, wv, w1, w2, c in blocks:
        d = len(wv) // heads
        x = torch.block_diag(*(torch.randn(d, d, generator=g) + 2 * torch.eye(d) for _ in range(heads)))
        perm = torch.randperm(len(w1), generator=g)
        out.append((wo @ torch.linalg.inv(x), x @ wv, w1[perm], w2[:, perm], c))
    return out


def found(L, seed, shared=0.5, G=3) -> tuple[float, float]:
    """(p, adjusted Rand index with the plan) of planted blocks behind gauges."""
    parts = S.signatures(gauge(S.demo_blocks(L, G, shared=shared, seed=seed), seed=seed))
    return S.null_test(parts, G, seed), S.rand_index(S.group(S.similarity(parts), G), np.arange(L) % G)


def test_signatures_are_free_of_gauge():
    blocks = S.demo_blocks(6, 3)
    a, b = S.similarity(S.signatures(blocks)), S.similarity(S.signatures(gauge(blocks, seed=1)))
    assert np.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("L", [8, 12])
def test_planted_groups_are_found(L):
    results = [found(L, seed) for seed in range(20)]
    assert np.mean([p <= 0.05 and ari == 1 for p, ari in results]) >= 0.95


def test_negative_control_single_matrices_do_not_show_planted_groups(monkeypatch):
    """W_V and W_1 instead of the products: gauge hides the groups."""
    monkeypatch.setattr(S, "signatures", lambda blocks: [torch.stack([b[1] for b in blocks]), torch.stack([b[2] for b in blocks])])
    assert np.mean([p <= 0.05 and ari == 1 for p, ari in (found(8, seed) for seed in range(5))]) == 0


def rank_one(L, seed, alpha=3.0, vary=0.0, D=32):
    """Random blocks that all write and read one direction, `vary`: more or less so."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g)
    u, v, w, e, q = (F.normalize(randn(n), dim=0) for n in (D, D, D, D, 6 * D))
    out = []
    for _ in range(L):
        wo, wv, w1, w2, c = randn(D, D), randn(D, D) / D**0.5, randn(4 * D, D), randn(D, 4 * D) / (4 * D) ** 0.5, randn(6 * D, D)
        a = alpha * (1 + vary * float(torch.rand((), generator=g) - 0.5))
        wv = torch.linalg.lstsq(wo, wo @ wv + a * D**0.5 * u[:, None] * v).solution  # W_O W_V gains the direction, exactly
        w1 = torch.linalg.pinv(w2) @ (w2 @ w1 + a * D**0.5 * w[:, None] * e)
        out.append((wo, wv, w1, w2, c + a * D**0.5 * q[:, None] * v))
    return out


def false_alarms(make, n=40, G=3) -> float:
    return np.mean([S.null_test(S.signatures(make(8, seed)), G, seed) <= 0.05 for seed in range(n)])


def test_one_direction_that_all_blocks_share_is_no_group():
    for vary in (0.0, 1.0):
        assert false_alarms(lambda L, seed: rank_one(L, seed, vary=vary)) <= 0.15


def test_negative_control_with_the_common_direction_left_in_it_is_taken_for_groups(monkeypatch):
    monkeypatch.setattr(S, "_without_common", lambda x: x)
    assert false_alarms(lambda L, seed: rank_one(L, seed, vary=1.0), n=10) >= 0.5


def drift(seed, planted, checks=12, L=8, D=24, step=0.08, frozen=False):
    """A latch fed with blocks whose weights move at random by `step` (relative) between checks; planted: each group as one."""
    g, latch = torch.Generator().manual_seed(seed), S.Structure(L, seed)
    blocks = S.demo_blocks(L, 3, D=D, shared=0.5 if planted else 0.0, seed=seed)
    seen = []
    for k in range(checks):
        seen.append(latch.check(k, blocks))
        if not frozen:
            blocks = [tuple(w + step * w.std() * torch.randn(w.shape, generator=g) for w in b) for b in blocks]
    return latch, seen


def test_frozen_blocks_are_not_looked_at_twice():
    latch, seen = drift(0, planted=True, frozen=True)
    assert seen[0] is not None and all(s is None for s in seen[1:]) and latch.groups is None


def test_random_blocks_that_drift_latch_in_at_most_five_per_cent_of_seeds():
    assert np.mean([drift(seed, planted=False)[0].latched is not None for seed in range(40)]) <= 0.05


def test_negative_control_without_the_null_random_blocks_latch(monkeypatch):
    monkeypatch.setattr(S, "null_test", lambda *a: 0.0)
    assert np.mean([drift(seed, planted=False)[0].latched is not None for seed in range(20)]) >= 0.3


def test_planted_groups_latch_at_the_third_check_and_give_way_only_to_others_that_converged():
    latch, _ = drift(1, planted=True, checks=6)
    plan = np.arange(8) % 3
    assert latch.latched == 2 and S.rand_index(np.array(latch.groups), plan) == 1
    for k in range(3):  # random blocks: nothing takes the groups' place
        latch.check(6 + k, S.demo_blocks(8, 3, D=24, shared=0.0, seed=50 + k))
    assert S.rand_index(np.array(latch.groups), plan) == 1
    order = [0, 3, 6, 1, 4, 7, 2, 5]  # other groups: planted in another order, twice is not enough
    for k in range(3):
        blocks = S.demo_blocks(8, 3, D=24, shared=0.6, seed=80 + k)
        latch.check(9 + k, [blocks[l] for l in order])
        assert (S.rand_index(np.array(latch.groups), plan[order]) == 1) == (k == 2)
    assert latch.latched == 2


def test_a_resumed_latch_goes_on_exactly(tmp_path):
    blocks = [S.demo_blocks(8, 3, seed=s) for s in range(6)]
    whole, half, again = (S.Structure(8) for _ in range(3))
    expected = [whole.check(k, b) for k, b in enumerate(blocks)]
    for k, b in enumerate(blocks[:3]):
        half.check(k, b)
    torch.save(half.state_dict(), tmp_path / "s.pt")
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert [again.check(k, b) for k, b in list(enumerate(blocks))[3:]] == expected[3:]


def test_contrast_and_rand_index_are_the_slow_definitions():
    rng = np.random.default_rng(0)
    x, a, b = rng.standard_normal((7, 7)), rng.integers(0, 3, 7), rng.integers(0, 2, 7)
    x = x + x.T
    pairs = list(itertools.combinations(range(7), 2))
    within, between = [x[i, j] for i, j in pairs if a[i] == a[j]], [x[i, j] for i, j in pairs if a[i] != a[j]]
    assert abs(S.contrast(x, a) - (np.mean(within) - np.mean(between))) < 1e-12
    n11 = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    sa, sb = sum(a[i] == a[j] for i, j in pairs), sum(b[i] == b[j] for i, j in pairs)
    expected = sa * sb / len(pairs)
    assert abs(S.rand_index(a, b) - (n11 - expected) / ((sa + sb) / 2 - expected)) < 1e-12
    assert S.rand_index(a, (a + 1) % 3) == 1 and S.rand_index(np.zeros(4), np.zeros(4)) == 1


# --- losses

def slow_grouped(hs, groups, eps=1e-3):
    u = [(b - a).mean(1) for a, b in itertools.pairwise(hs)]
    u = [x - x.mean(0) for x in u]
    U = {g: sum(u[l] for l in range(len(u)) if groups[l] == g) / groups.count(g) for g in set(groups)}
    cos2 = [float((U[g][b] @ U[h][b]) / torch.sqrt(U[g][b] @ U[g][b] + eps**2) / torch.sqrt(U[h][b] @ U[h][b] + eps**2)) ** 2
            for g, h in itertools.combinations(sorted(U), 2) for b in range(len(hs[0]))]
    return np.mean(cos2)


def test_the_grouped_loss_is_the_slow_loop_and_bounded():
    hs, groups = [torch.randn(4, 6, 10) for _ in range(7)], [0, 0, 1, 1, 2, 2]
    loss = float(S.grouped_loss(hs, groups))
    assert abs(loss - slow_grouped(hs, groups)) < 1e-5 and 0 <= loss <= 1
    alike = [k * torch.ones(1, 1, 3) * torch.arange(4.0)[:, None, None] for k in range(4)]
    assert float(S.grouped_loss(alike, [0, 1, 2])) > 0.9, "three groups that add the same thing"
    apart = torch.zeros(4, 4, 1, 3)
    for l in range(1, 4):
        apart[l] = apart[l - 1]
        apart[l, :, 0, l - 1] += torch.randn(4)
    assert float(S.grouped_loss(list(apart), [0, 1, 2])) < 1e-9, "orthogonal work"


def test_negative_control_without_the_increments_orthogonal_work_looks_alike(monkeypatch):
    """Comparing the h themselves, not what is added: h_1 is part of h_2."""
    apart = torch.zeros(4, 4, 1, 3)
    for l in range(1, 4):
        apart[l] = apart[l - 1]
        apart[l, :, 0, l - 1] += torch.randn(4)
    raw = [torch.zeros_like(apart[0])] + [sum(apart[1 : l + 1]) for l in range(1, 4)]  # increments of raw are the h themselves
    assert float(S.grouped_loss(raw, [0, 1, 2])) > 0.1


def test_losses_are_finite_where_blocks_add_nothing():
    h = torch.randn(4, 6, 10)
    for loss in S.LOSSES.values():
        hs = [h.clone().requires_grad_() for _ in range(5)]
        value = loss(hs, [0, 0, 1, 1])
        value.backward()
        assert torch.isfinite(value) and all(torch.isfinite(x.grad).all() for x in hs if x.grad is not None)
    assert float(S.grouped_loss([h] * 5, [0, 0, 1, 1])) == 0


def test_the_dispersive_loss_is_the_slow_loop_and_bounded():
    hs = [torch.randn(5, 3, 4) for _ in range(9)]
    z = hs[2].flatten(1)
    slow = np.log(np.mean([float(torch.exp(-((z[i] - z[j]) ** 2).sum() / (12 * 0.5))) for i in range(5) for j in range(5)]))
    assert abs(float(S.dispersive_loss(hs)) - slow) < 1e-5 and -np.log(5) <= slow <= 0
    assert abs(float(S.dispersive_loss([torch.ones(5, 3, 4)] * 9))) < 1e-6


def test_padding_does_not_count():
    hs, mask = [torch.randn(3, 6, 8) for _ in range(5)], torch.tensor([[True] * 4 + [False] * 2] * 3)
    other = [torch.where(mask[..., None], h, torch.full_like(h, 9.0)) for h in hs]
    for loss in S.LOSSES.values():
        assert torch.allclose(loss(hs, [0, 0, 1, 1], mask), loss(other, [0, 0, 1, 1], mask), atol=1e-6)


def test_the_weight_ramps_in_from_the_latch_and_follows_r():
    assert S.weight(1.0, 0.1, 500, None, 100) == 0 and S.weight(1.0, 0.1, 500, 500, 100) == 0
    assert abs(S.weight(0.5, 0.1, 550, 500, 100) - 0.1 * 0.5 * 0.5) < 1e-12 and S.weight(0.5, 0.1, 900, 500, 100) == 0.05
