"""Claims about the blocks' grouping, its test, and the losses."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import structure_reg as S


def gauge(blocks, heads=4, seed=0):
    """The same functions: each head's values changed by a random invertible matrix (undone in W_O), hidden
    units renumbered."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for wo, wv, w1, w2, c in blocks:
        d = len(wv) // heads
        heads_of_x = [torch.randn(d, d, generator=generator) + 2 * torch.eye(d) for _ in range(heads)]
        x = torch.block_diag(*heads_of_x)
        order = torch.randperm(len(w1), generator=generator)
        changed.append((wo @ torch.linalg.inv(x), x @ wv, w1[order], w2[:, order], c))
    return changed


# --- planted groups

def found(L, seed, shared=0.5, G=3) -> tuple[float, float]:
    """(p, adjusted Rand index with the plan) of planted blocks behind gauges."""
    parts = S.signatures(gauge(S.demo_blocks(L, G, shared=shared, seed=seed), seed=seed))
    recovered = S.rand_index(S.group(S.similarity(parts), G), np.arange(L) % G)
    return S.null_test(parts, G, seed), recovered


def share_found(L, seeds) -> float:
    """Share of seeds whose groups are significant and exactly those planted."""
    return np.mean([p <= 0.05 and recovered == 1 for p, recovered in (found(L, seed) for seed in seeds)])


def test_signatures_are_free_of_gauge():
    blocks = S.demo_blocks(6, 3)
    before, after = (S.similarity(S.signatures(some)) for some in (blocks, gauge(blocks, seed=1)))
    assert np.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("L", [8, 12])
def test_planted_groups_are_found(L):
    assert share_found(L, range(20)) >= 0.95


def test_negative_control_single_matrices_do_not_show_planted_groups(monkeypatch):
    """W_V and W_1 instead of the products: gauge hides the groups."""
    def single_matrices(blocks):
        return [torch.stack([block[k] for block in blocks]) for k in (1, 2)]

    monkeypatch.setattr(S, "signatures", single_matrices)
    assert share_found(8, range(5)) == 0


# --- what is no group

def rank_one(L, seed, alpha=3.0, vary=0.0, width=32):
    """Random blocks that all write and read one direction, `vary`: more or less so."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    W, hidden = width, 4 * width
    u, v, w, e, q = (F.normalize(randn(n), dim=0) for n in (W, W, W, W, 6 * W))
    blocks = []
    for _ in range(L):
        wo, wv, w1 = randn(W, W), randn(W, W) / W**0.5, randn(hidden, W)
        w2, c = randn(W, hidden) / hidden**0.5, randn(6 * W, W)
        size = alpha * (1 + vary * float(torch.rand((), generator=generator) - 0.5)) * W**0.5
        # W_O W_V and W_2 W_1 gain the direction, exactly.
        wv = torch.linalg.lstsq(wo, wo @ wv + size * u[:, None] * v).solution
        w1 = torch.linalg.pinv(w2) @ (w2 @ w1 + size * w[:, None] * e)
        blocks.append((wo, wv, w1, w2, c + size * q[:, None] * v))
    return blocks


def false_alarms(vary, seeds=40, L=8, G=3) -> float:
    """Share of seeds where blocks with one direction in common pass for groups."""
    p = [S.null_test(S.signatures(rank_one(L, seed, vary=vary)), G, seed) for seed in range(seeds)]
    return np.mean(np.array(p) <= 0.05)


@pytest.mark.parametrize("vary", [0.0, 1.0])
def test_one_direction_that_all_blocks_share_is_no_group(vary):
    assert false_alarms(vary) <= 0.15


def test_negative_control_with_the_common_direction_left_in_it_is_taken_for_groups(monkeypatch):
    monkeypatch.setattr(S, "_without_common", lambda x: x)
    assert false_alarms(vary=1.0, seeds=10) >= 0.5


# --- the detector

def drift(seed, planted, checks=12, L=8, width=24, step=0.08, frozen=False):
    """A detector given blocks whose weights move at random by `step` (relative) between checks -> detector,
    what each check returned. planted: the blocks have groups."""
    generator, detector = torch.Generator().manual_seed(seed), S.GroupDetector(L, seed)
    blocks = S.demo_blocks(L, 3, width=width, shared=0.5 if planted else 0.0, seed=seed)
    results = []

    def moved(weight):
        return weight + step * weight.std() * torch.randn(weight.shape, generator=generator)

    for k in range(checks):
        results.append(detector.check(k, blocks))
        if not frozen:
            blocks = [tuple(moved(weight) for weight in block) for block in blocks]
    return detector, results


def share_accepted(seeds) -> float:
    """Share of seeds where random blocks that drift end with groups."""
    return np.mean([drift(seed, planted=False)[0].activated_at is not None for seed in range(seeds)])


def test_frozen_blocks_are_not_checked_twice():
    detector, results = drift(0, planted=True, frozen=True)
    assert results[0] is not None and all(result is None for result in results[1:])
    assert detector.groups is None


def test_random_blocks_that_drift_are_accepted_in_at_most_five_per_cent_of_seeds():
    assert share_accepted(40) <= 0.05


def test_negative_control_without_the_null_random_blocks_are_accepted(monkeypatch):
    monkeypatch.setattr(S, "null_test", lambda *a: 0.0)
    assert share_accepted(20) >= 0.3


def test_planted_groups_are_accepted_at_the_third_check_and_give_way_only_to_others_that_converged():
    detector, _ = drift(1, planted=True, checks=6)
    plan = np.arange(8) % 3
    assert detector.activated_at == 2 and S.rand_index(np.array(detector.groups), plan) == 1
    for k in range(3):  # random blocks: nothing takes the groups' place
        detector.check(6 + k, S.demo_blocks(8, 3, width=24, shared=0.0, seed=50 + k))
    assert S.rand_index(np.array(detector.groups), plan) == 1
    order = [0, 3, 6, 1, 4, 7, 2, 5]  # other groups: planted in another order, twice is not enough
    for k in range(3):
        blocks = S.demo_blocks(8, 3, width=24, shared=0.6, seed=80 + k)
        detector.check(9 + k, [blocks[block] for block in order])
        assert (S.rand_index(np.array(detector.groups), plan[order]) == 1) == (k == 2)
    assert detector.activated_at == 2


def test_a_resumed_detector_goes_on_exactly(tmp_path):
    networks = [S.demo_blocks(8, 3, seed=seed) for seed in range(6)]
    whole, half, again = (S.GroupDetector(8) for _ in range(3))
    expected = [whole.check(k, blocks) for k, blocks in enumerate(networks)]
    for k in range(3):
        half.check(k, networks[k])
    torch.save(half.state_dict(), tmp_path / "s.pt")
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert [again.check(k, networks[k]) for k in range(3, 6)] == expected[3:]


def test_contrast_and_rand_index_are_the_slow_definitions():
    rng = np.random.default_rng(0)
    x, a, b = rng.standard_normal((7, 7)), rng.integers(0, 3, 7), rng.integers(0, 2, 7)
    x = x + x.T
    pairs = list(itertools.combinations(range(7), 2))
    within = [x[i, j] for i, j in pairs if a[i] == a[j]]
    between = [x[i, j] for i, j in pairs if a[i] != a[j]]
    assert abs(S.contrast(x, a) - (np.mean(within) - np.mean(between))) < 1e-12
    in_both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = sum(a[i] == a[j] for i, j in pairs), sum(b[i] == b[j] for i, j in pairs)
    expected = in_a * in_b / len(pairs)
    slow = (in_both - expected) / ((in_a + in_b) / 2 - expected)
    assert abs(S.rand_index(a, b) - slow) < 1e-12
    assert S.rand_index(a, (a + 1) % 3) == 1 and S.rand_index(np.zeros(4), np.zeros(4)) == 1


def test_depth_groups_are_first_middle_and_last():
    assert S.depth_groups(6, 3) == [0, 0, 1, 1, 2, 2] and S.depth_groups(4, 2) == [0, 0, 1, 1]


# --- losses

def slow_grouped(hs, groups, eps=1e-3) -> float:
    u = [(after - before).mean(1) for before, after in itertools.pairwise(hs)]
    u = [x - x.mean(0) for x in u]
    U = {}
    for name in set(groups):
        U[name] = sum(x for x, group in zip(u, groups) if group == name) / groups.count(name)

    def unit(x):
        return x / torch.sqrt(x @ x + eps**2)

    pairs = itertools.combinations(sorted(U), 2)
    return np.mean([float(unit(U[g][clip]) @ unit(U[h][clip])) ** 2 for g, h in pairs
                    for clip in range(len(hs[0]))])


def orthogonal_work() -> torch.Tensor:
    """hs (4, B, T, W) of three blocks, each of which adds to a channel of its own."""
    hs = torch.zeros(4, 4, 1, 3)
    for block in range(1, 4):
        hs[block] = hs[block - 1]
        hs[block, :, 0, block - 1] += torch.randn(4)
    return hs


def test_the_grouped_loss_is_the_slow_loop_and_bounded():
    hs, groups = [torch.randn(4, 6, 10) for _ in range(7)], [0, 0, 1, 1, 2, 2]
    loss = float(S.grouped_loss(hs, groups))
    assert abs(loss - slow_grouped(hs, groups)) < 1e-5 and 0 <= loss <= 1
    alike = [k * torch.ones(1, 1, 3) * torch.arange(4.0)[:, None, None] for k in range(4)]
    assert float(S.grouped_loss(alike, [0, 1, 2])) > 0.9, "three groups that add the same thing"
    assert float(S.grouped_loss(list(orthogonal_work()), [0, 1, 2])) < 1e-9, "orthogonal work"


def test_negative_control_without_the_increments_orthogonal_work_counts_as_shared():
    """Comparing the h themselves, not what is added: h_1 is part of h_2."""
    hs = orthogonal_work()
    # The increments of these are the h themselves.
    raw = [torch.zeros_like(hs[0])] + [sum(hs[1 : block + 1]) for block in range(1, 4)]
    assert float(S.grouped_loss(raw, [0, 1, 2])) > 0.1


def test_losses_are_finite_where_blocks_add_nothing():
    h = torch.randn(4, 6, 10)
    for loss in S.LOSSES.values():
        hs = [h.clone().requires_grad_() for _ in range(5)]
        value = loss(hs, [0, 0, 1, 1])
        value.backward()
        gradients = [x.grad for x in hs if x.grad is not None]
        assert torch.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert float(S.grouped_loss([h] * 5, [0, 0, 1, 1])) == 0


def test_the_dispersive_loss_is_the_slow_loop_and_bounded():
    hs = [torch.randn(5, 3, 4) for _ in range(9)]
    z = hs[2].flatten(1)
    pairs = itertools.product(range(5), repeat=2)
    slow = np.log(np.mean([float(torch.exp(-((z[i] - z[j]) ** 2).sum() / (12 * 0.5))) for i, j in pairs]))
    assert abs(float(S.dispersive_loss(hs)) - slow) < 1e-5 and -np.log(5) <= slow <= 0
    assert abs(float(S.dispersive_loss([torch.ones(5, 3, 4)] * 9))) < 1e-6


def test_padding_does_not_count():
    hs, mask = [torch.randn(3, 6, 8) for _ in range(5)], torch.tensor([[True] * 4 + [False] * 2] * 3)
    other = [torch.where(mask[..., None], h, torch.full_like(h, 9.0)) for h in hs]
    for loss in S.LOSSES.values():
        assert torch.allclose(loss(hs, [0, 0, 1, 1], mask), loss(other, [0, 0, 1, 1], mask), atol=1e-6)


def test_the_weight_ramps_in_from_the_acceptance_and_follows_r():
    assert S.struct_weight(1.0, 0.1, 500, None, 100) == 0, "no groups yet"
    assert S.struct_weight(1.0, 0.1, 500, 500, 100) == 0, "the ramp begins"
    assert abs(S.struct_weight(0.5, 0.1, 550, 500, 100) - 0.1 * 0.5 * 0.5) < 1e-12
    assert S.struct_weight(0.5, 0.1, 900, 500, 100) == 0.05
