"""Claims about the blocks' grouping, its test, and the losses."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import structure_reg as S

DRAWS = 39  # of the second null: enough for p <= .05, in a fifth of the time


@pytest.fixture
def few_draws(monkeypatch):
    """The detector's second test with fewer draws; its level is the same."""
    whole = S.depth_test
    monkeypatch.setattr(S, "depth_test", lambda similarity, G, seed: whole(similarity, G, seed, DRAWS))


def gauge(blocks, heads=4, seed=0):
    """The same functions: each head's values changed by a random invertible matrix (undone in W_O),
    hidden units renumbered."""
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
    """(larger p of the two tests, adjusted Rand index with the plan) of planted blocks behind gauges."""
    parts = S.signatures(gauge(S.demo_blocks(L, G, shared=shared, seed=seed), seed=seed))
    similarity = S.similarity(parts)
    recovered = S.rand_index(S.group(similarity, G), np.arange(L) % G)
    return max(S.axes_test(parts, G, seed), S.depth_test(similarity, G, seed, DRAWS)), recovered


def share_found(L, seeds) -> float:
    """Share of seeds whose groups are significant and exactly those planted."""
    return np.mean([p <= 0.05 and recovered == 1 for p, recovered in (found(L, seed) for seed in seeds)])


def test_signatures_are_free_of_gauge():
    blocks = S.demo_blocks(6, 3)
    before, after = (S.similarity(S.signatures(some)) for some in (blocks, gauge(blocks, seed=1)))
    assert np.allclose(before, after, atol=1e-3)


def test_the_mean_direction_that_layer_norm_takes_out_is_no_part_of_a_signature():
    blocks, generator = S.demo_blocks(6, 3), torch.Generator().manual_seed(0)

    def shifted(x):
        return x + 5 * torch.randn(len(x), 1, generator=generator)
    after = [(wo, shifted(wv), shifted(w1), w2, c) for wo, wv, w1, w2, c in blocks]
    assert np.allclose(*(S.similarity(S.signatures(some)) for some in (blocks, after)), atol=1e-3)
    moved = [(shifted(wo), wv, w1, w2, c) for wo, wv, w1, w2, c in blocks]
    assert not np.allclose(*(S.similarity(S.signatures(some)) for some in (blocks, moved)), atol=1e-2)


def test_the_leading_singular_pair_of_the_mean_is_projected_out_on_both_sides():
    x = torch.randn(5, 12, 8) + 2 * torch.randn(12, 1) * torch.randn(8)
    u, _, v = torch.linalg.svd(x.mean(0))
    left, right = torch.eye(12) - torch.outer(u[:, 0], u[:, 0]), torch.eye(8) - torch.outer(v[0], v[0])
    assert torch.allclose(S._without_common(x), left @ x @ right, atol=1e-4)


def test_signatures_do_not_depend_on_the_size_of_a_blocks_weights():
    blocks = S.demo_blocks(6, 3)
    larger = [tuple(10 * w for w in block) if k == 2 else block for k, block in enumerate(blocks)]
    assert np.allclose(*(S.similarity(S.signatures(some)) for some in (blocks, larger)), atol=1e-4)


def test_similarity_is_the_mean_cosine_of_all_three_parts():
    parts = S.signatures(S.demo_blocks(6, 3))
    slow = [[np.mean([np.sum(x[i] * x[j]) for x in parts]) for j in range(6)] for i in range(6)]
    assert len(parts) == 3 and np.allclose(S.similarity(parts), slow, atol=1e-5)


def test_adaln_counts_once_it_has_left_0_in_every_block():
    blocks = S.demo_blocks(6, 3)
    assert len(S.signatures(blocks)) == 3
    *others, c = blocks[2]
    blocks[2] = (*others, 0 * c)
    assert len(S.signatures(blocks)) == 2


@pytest.mark.parametrize("L", [8, 12])
def test_planted_groups_are_found(L):
    assert share_found(L, range(20)) >= 0.95


def test_negative_control_single_matrices_do_not_show_planted_groups(monkeypatch):
    """W_V and W_1 instead of the products: gauge hides the groups."""
    def single_matrices(blocks):
        return [torch.stack([block[k] for block in blocks]) for k in (1, 2)]

    monkeypatch.setattr(S, "signatures", single_matrices)
    assert share_found(8, range(5)) == 0


def test_groups_are_those_of_average_linkage_numbered_by_first_appearance():
    """The slow definition: the two clusters most alike in the mean are merged, until three are left."""
    for seed in range(20):
        similarity, clusters = noisy(np.zeros((8, 8)), seed, 0.3), [[block] for block in range(8)]
        while len(clusters) > 3:
            a, b = max(itertools.combinations(clusters, 2), key=lambda pair: similarity[np.ix_(*pair)].mean())
            clusters = [c for c in clusters if c not in (a, b)] + [a + b]
        clusters.sort(key=min)
        assert S.group(similarity).tolist() == [next(g for g, c in enumerate(clusters) if block in c)
                                                for block in range(8)]


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
    p = [S.axes_test(S.signatures(rank_one(L, seed, vary=vary)), G, seed) for seed in range(seeds)]
    return np.mean(np.array(p) <= 0.05)


@pytest.mark.parametrize("vary", [0.0, 1.0])
def test_one_direction_that_all_blocks_share_is_no_group(vary):
    assert false_alarms(vary) <= 0.15


def test_negative_control_with_the_common_direction_left_in_it_is_taken_for_groups(monkeypatch):
    monkeypatch.setattr(S, "_without_common", lambda x: x)
    assert false_alarms(vary=1.0, seeds=10) >= 0.5


# --- what is depth

def by_depth(L: int) -> dict[str, np.ndarray]:
    """Similarities (L, L) that are depth alone."""
    place = np.arange(L)
    apart, first, last = np.abs(place[:, None] - place), place == 0, place == L - 1
    of_first, of_last = first[:, None] | first, last[:, None] | last
    return {
        "exponential": 0.5 * np.exp(-apart / 2),
        "slowly exponential": 0.5 * np.exp(-apart / 4),
        "linear": 0.4 - 0.04 * apart,
        "the ends differ": 0.3 - 0.15 * of_first - 0.1 * of_last,
        "all of it": 0.4 * np.exp(-apart / 2) - 0.1 * of_first - 0.05 * of_last,
    }


def noisy(S0: np.ndarray, seed: int, noise: float = 0.02) -> np.ndarray:
    """S0 (L, L) with symmetric noise; 1 on the diagonal."""
    drawn = noise * np.random.default_rng(seed).standard_normal(S0.shape)
    found = S0 + (drawn + drawn.T) / 2**0.5
    np.fill_diagonal(found, 1)
    return found


def share_significant(S0: np.ndarray, copies: int = 40, test=S.depth_test) -> float:
    """Share of noisy copies of S0 that pass for grouped at p <= .05."""
    return np.mean([test(noisy(S0, seed), 3, seed, DRAWS) <= 0.05 for seed in range(copies)])


@pytest.mark.parametrize("L", [8, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", by_depth(8))
def test_a_similarity_that_is_depth_alone_is_taken_for_groups_in_at_most_a_tenth_of_draws(shape, L):
    assert share_significant(by_depth(L)[shape]) <= 0.1


def test_negative_control_without_a_model_of_depth_it_is_taken_for_groups():
    """The values in random order, with nothing taken out before."""
    def permutation_test(similarity, G, seed, draws):
        rng, (i, j) = np.random.default_rng(seed), np.triu_indices(len(similarity), 1)

        def grouped(values):
            matrix = np.eye(len(similarity))
            matrix[i, j] = matrix[j, i] = values
            return S.contrast(matrix, S.group(matrix, G))

        values = similarity[i, j]
        reached = sum(grouped(rng.permutation(values)) >= grouped(values) for _ in range(draws))
        return (1 + reached) / (1 + draws)

    for shape in ("exponential", "linear", "all of it"):
        assert share_significant(by_depth(12)[shape], 10, permutation_test) >= 0.9


PLANS = [np.arange(8) % 3, np.array([0, 1, 1, 2, 0, 2, 1, 0]),
         np.array([0, 1, 1, 2, 0, 2, 1, 0, 2, 2, 0, 1])]


@pytest.mark.parametrize("plan", PLANS, ids=["by threes", "irregular", "irregular, 12"])
def test_groups_planted_into_the_same_depth_are_significant(plan):
    """Blocks of a group are more alike by a quarter of what neighbours are (0.4)."""
    depth, same = by_depth(len(plan))["all of it"], plan[:, None] == plan
    assert share_significant(depth + 0.1 * same) >= 0.9


def test_depth_takes_six_blocks():
    """Five have ten pairs, of which depth explains five: p is 1 whatever the groups."""
    for L, testable in ((2, False), (4, False), (5, False), (6, True), (7, True)):
        plan = np.arange(L) % 3
        p = S.depth_test(noisy(0.2 + 0.4 * (plan[:, None] == plan), 0), 3, 0, 99)
        assert (p < 0.05) if testable else (p == 1.0)


def test_depth_is_taken_out_by_least_squares_and_the_null_is_what_is_left_in_random_order(monkeypatch):
    """What reaches the grouping is what numpy's least squares leave, of S and of each draw; a trend of
    depth that is added to S changes nothing."""
    grouped = []
    monkeypatch.setattr(S, "group", lambda x, G: grouped.append(x) or PLANS[0])
    i, j = np.triu_indices(8, 1)
    X = np.stack([np.ones(len(i)), j - i, 1 / (j - i), i == 0, j == 7], 1).astype(float)

    def left(values):
        return values - X @ np.linalg.lstsq(X, values, rcond=None)[0]

    plain, trend = noisy(0.2 * (PLANS[1][:, None] == PLANS[1]), 3), np.zeros((8, 8))
    trend[i, j] = trend[j, i] = X @ [0.3, -0.04, 0.5, 0.2, -0.1]
    rest, rng = left(plain[i, j]), np.random.default_rng(0)
    expected = [rest, *(left(rng.permutation(rest)) for _ in range(5))]
    for similarity in (plain, plain + trend):
        grouped.clear()
        p = S.depth_test(similarity, 3, 0, 5)
        assert len(grouped) == 6 and all(np.array_equal(x, x.T) for x in grouped)
        assert all(np.allclose(x[i, j], values) for x, values in zip(grouped, expected))
        contrasts = [S.contrast(x, PLANS[0]) / x[i, j].std() for x in grouped]
        assert p == (1 + sum(np.array(contrasts[1:]) >= contrasts[0])) / 6


# --- the detector

def chain(L, seed, alike=0.8, planted=0.0, width=24):
    """Blocks of which each shares weights (share of the variance: `alike`) with the one before, and
    (`planted`) with every third one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [weight.shape for weight in S.demo_blocks(1, 1, width=width)[0]]

    def new():
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    def mixed(a, b, share):
        return tuple((1 - share) ** 0.5 * x + share**0.5 * y for x, y in zip(a, b))

    blocks = [new()]
    while len(blocks) < L:
        blocks.append(mixed(new(), blocks[-1], alike))
    common = [new() for _ in range(3)]
    return [mixed(block, common[k % 3], planted) for k, block in enumerate(blocks)]


def drift(seed, planted=True, checks=12, L=8, width=24, step=0.08, frozen=False, r=1.0, blocks=None):
    """A detector given blocks whose weights move at random by `step` (relative) between checks at regime
    r -> detector, what each check returned. planted: the blocks have groups; blocks: these instead."""
    generator, detector = torch.Generator().manual_seed(seed), S.GroupDetector(L, seed)
    if blocks is None:
        blocks = S.demo_blocks(L, 3, width=width, shared=0.5 if planted else 0.0, seed=seed)
    results = []

    def moved(weight):
        return weight + step * weight.std() * torch.randn(weight.shape, generator=generator)

    for k in range(checks):
        results.append(detector.check(k, blocks, r))
        if not frozen:
            blocks = [tuple(moved(weight) for weight in block) for block in blocks]
    return detector, results


def share_accepted(seeds) -> float:
    """Share of seeds where random blocks that drift end with groups."""
    ends = [drift(seed, planted=False, width=16)[0].activated_at for seed in range(seeds)]
    return np.mean([activated_at is not None for activated_at in ends])


def test_frozen_blocks_are_not_checked_twice():
    detector, results = drift(0, planted=True, frozen=True)
    assert results[0] is not None and all(result is None for result in results[1:])
    assert detector.groups is None


def test_random_blocks_that_drift_are_accepted_in_at_most_five_per_cent_of_seeds(monkeypatch):
    """By the first test alone; with the second, which can only refuse more, in no more."""
    monkeypatch.setattr(S, "depth_test", lambda *a: 0.0)
    assert share_accepted(12) <= 0.05


def test_negative_control_without_the_null_random_blocks_are_accepted(monkeypatch):
    for test in ("axes_test", "depth_test"):
        monkeypatch.setattr(S, test, lambda *a: 0.0)
    assert share_accepted(20) >= 0.3


def test_groups_that_change_between_checks_are_never_accepted(monkeypatch):
    """Even where most pairs of blocks stay together."""
    for test in ("axes_test", "depth_test"):
        monkeypatch.setattr(S, test, lambda *a: 0.005)
    plans = itertools.cycle([np.array([0, 0, 0, 1, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 2, 2])])
    monkeypatch.setattr(S, "group", lambda x, G: next(plans))
    detector, results = drift(0, checks=6)
    assert [found["streak"] for found in results] == [1] * 6 and detector.groups is None
    assert results[1]["rand_index"] > 0.5


@pytest.mark.parametrize("fine, accepted", [(0.005, True), (0.01, False)])
def test_converged_groups_are_accepted_only_if_they_pass_the_finer_null(monkeypatch, fine, accepted):
    def axes_test(parts, G, seed, draws=S.DRAWS):
        return fine if draws == 199 else 0.025

    monkeypatch.setattr(S, "axes_test", axes_test)
    monkeypatch.setattr(S, "depth_test", lambda *a: 0.005)
    detector, results = drift(1, checks=4)
    assert results[-1]["streak"] == 4 and (detector.groups is not None) == accepted


def test_blocks_are_checked_again_once_their_weights_have_moved_by_one_per_cent(few_draws):
    assert [found is None for found in drift(0, checks=5, step=0.008)[1]] == [False, True, False, True, False]
    assert None not in drift(0, checks=3, step=0.012)[1]


def test_in_the_null_each_block_has_other_axes_and_its_parts_have_the_same(monkeypatch):
    """Blocks that are left as they are reach the observed contrast at every draw: p = 1. The least p is that
    of no draw: 1 / 40."""
    parts, seen = S.signatures(S.demo_blocks(6, 3, shared=0.9)), []
    assert S.axes_test(parts, 3, 0) == 1 / 40
    monkeypatch.setattr(S, "_relabel", lambda block, *how: seen.append(how) or block)
    assert S.axes_test(parts, 3, 0, 1) == 1 and len(seen) == 18
    A, M, C = (np.array([np.stack(how) for how in seen[6 * k : 6 * k + 6]]) for k in range(3))
    assert np.array_equal(A, M) and np.array_equal(A, C) and len({tuple(x) for x in A[:, 0]}) == 6
    assert (np.sort(A[:, 0]) == np.arange(32)).all() and (np.unique(A[:, 1]) == [-1, 1]).all()


def test_a_check_groups_and_weighs_what_depth_leaves(monkeypatch):
    for test in ("axes_test", "depth_test"):
        monkeypatch.setattr(S, test, lambda *a: 0.5)
    blocks = chain(8, 0)
    similarity = S.similarity(S.signatures(blocks))
    labels = S.group(S.beyond_depth(similarity))
    found = S.GroupDetector(8).check(0, blocks, 1.0)
    assert found["groups"] == labels.tolist() != S.group(similarity).tolist(), "negative control: with depth"
    assert found["contrast"] == S.contrast(S.beyond_depth(similarity), labels)


def test_each_null_of_each_check_has_random_numbers_of_its_own(monkeypatch):
    seeds = []
    for test in ("axes_test", "depth_test"):
        monkeypatch.setattr(S, test, lambda x, G, seed, *draws: seeds.append(tuple(seed)) or 0.005)
    monkeypatch.setattr(S, "group", lambda *a: np.arange(8) % 3)
    assert drift(1, checks=4)[0].activated_at == 2
    assert len(seeds) == len(set(seeds)) == 9 and {seed for seed, *_ in seeds} == {1}


def test_there_are_three_groups_or_two_below_six_blocks():
    assert [S.GroupDetector(L).G for L in (2, 4, 5, 6, 12)] == [2, 2, 2, 3, 3]


def test_a_block_in_other_axes_is_its_products_between_them():
    rng = np.random.default_rng(0)
    A, order = rng.standard_normal((6, 6)).astype(np.float32), rng.permutation(6)
    sign = rng.choice(np.float32([-1, 1]), 6)
    P = np.diag(sign) @ np.eye(6)[order]
    assert np.allclose(S._relabel(A, order, sign), P @ A @ P.T, atol=1e-6)
    C = rng.standard_normal((36, 6)).astype(np.float32)  # adaLN's six outputs; what it reads is no stream
    assert np.allclose(S._relabel(C, order, sign), np.kron(np.eye(6), P) @ C, atol=1e-6)


def test_planted_groups_are_accepted_at_the_third_check_and_give_way_only_to_others_that_converged(
        few_draws):
    detector, _ = drift(1, planted=True, checks=6)
    plan = np.arange(8) % 3
    assert detector.activated_at == 2 and S.rand_index(np.array(detector.groups), plan) == 1
    for k in range(3):  # random blocks: nothing takes the groups' place
        detector.check(6 + k, S.demo_blocks(8, 3, width=24, shared=0.0, seed=50 + k), 1.0)
    assert S.rand_index(np.array(detector.groups), plan) == 1
    order = [0, 3, 6, 1, 4, 7, 2, 5]  # other groups: planted in another order, twice is not enough
    for k in range(3):
        blocks = S.demo_blocks(8, 3, width=24, shared=0.6, seed=80 + k)
        detector.check(9 + k, [blocks[block] for block in order], 1.0)
        assert (S.rand_index(np.array(detector.groups), plan[order]) == 1) == (k == 2)
    assert detector.activated_at == 2


@pytest.mark.parametrize("r", [0.0, 0.25, 0.5])
def test_while_semantics_are_acquired_no_groups_are_accepted(r, few_draws):
    """The same blocks at the same checks: converged, but not accepted up to r = .5; at once past it."""
    early, found_early = drift(1, checks=6, r=r)
    late, found_late = drift(1, checks=6, r=0.51)
    assert not any(check.pop("accepted") for check in found_early)
    assert [check.pop("accepted") for check in found_late] == [k >= 2 for k in range(6)]
    assert found_early == found_late, "r has no part in what is found"
    assert early.groups is None and early.activated_at is None and late.activated_at == 2
    assert early.streak == late.streak == 6
    early.check(6, S.demo_blocks(8, 3, width=24, shared=0.6, seed=5), 0.51)
    assert early.groups == late.groups and early.activated_at == 6


def test_groups_that_are_depth_alone_are_not_accepted_though_they_pass_the_first_test(
        few_draws):
    """Neighbours share weights: alike along the residual axes, so the blocks are no random ones, and
    grouped by nothing but depth."""
    for seed in range(8):
        detector, results = drift(seed, checks=4, step=0.03, blocks=chain(8, seed))
        assert max(result["p"] for result in results) <= S.ALPHA and detector.groups is None


def test_negative_control_without_the_second_test_depth_is_accepted_as_groups(monkeypatch):
    monkeypatch.setattr(S, "depth_test", lambda *a: 0.0)
    accepted = [drift(seed, checks=4, step=0.03, blocks=chain(8, seed))[0].groups for seed in range(8)]
    assert np.mean([groups is not None for groups in accepted]) >= 0.5


def test_where_depth_and_groups_are_both_there_the_groups_are_accepted_and_not_the_depth(few_draws):
    """Neighbours share seven tenths of the variance, every third block a tenth."""
    plan = np.arange(8) % 3
    networks = [chain(8, seed, alike=0.7, planted=0.1) for seed in range(6)]
    detectors = [drift(k, checks=4, step=0.03, blocks=blocks)[0] for k, blocks in enumerate(networks)]
    accepted = [np.array(detector.groups) for detector in detectors if detector.groups is not None]
    assert len(accepted) >= 3
    assert np.mean([S.rand_index(groups, plan) for groups in accepted]) > 0.5


def test_four_blocks_are_too_few_for_any_acceptance():
    """Their groups can't be told from depth."""
    detector, results = drift(0, checks=6, L=4, blocks=S.demo_blocks(4, 2, width=24, shared=0.6))
    assert all(result["p_depth"] == 1.0 and result["streak"] == 0 for result in results)
    assert detector.groups is None


def test_a_resumed_detector_goes_on_exactly(tmp_path):
    networks = [S.demo_blocks(8, 3, seed=seed) for seed in range(6)]
    whole, half, again = (S.GroupDetector(8) for _ in range(3))
    expected = [whole.check(k, blocks, 1.0) for k, blocks in enumerate(networks)]
    for k in range(3):
        half.check(k, networks[k], 1.0)
    half.take_ratio(0.3)
    torch.save(half.state_dict(), tmp_path / "s.pt")
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert [again.check(k, networks[k], 1.0) for k in range(3, 6)] == expected[3:]
    assert again.ratio == half.ratio == 0.3


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
    for some in (hs, [1e-3 * h for h in hs]):  # the second: as small as eps
        loss = float(S.grouped_loss(some, groups))
        assert abs(loss - slow_grouped(some, groups)) < 1e-5 and 0 <= loss <= 1
    alike = [k * torch.ones(1, 1, 3) * torch.arange(4.0)[:, None, None] for k in range(4)]
    assert float(S.grouped_loss(alike, [0, 1, 2])) > 0.9, "three groups that add the same thing"
    assert float(S.grouped_loss(list(orthogonal_work()), [0, 1, 2])) < 1e-9, "orthogonal work"


def test_negative_control_without_the_increments_orthogonal_work_counts_as_shared():
    """Comparing the h themselves, not what is added: h_1 is part of h_2."""
    hs = orthogonal_work()
    # The increments of these are the h themselves.
    raw = [torch.zeros_like(hs[0])] + [sum(hs[1 : block + 1]) for block in range(1, 4)]
    assert float(S.grouped_loss(raw, [0, 1, 2])) > 0.1


def test_the_grouped_loss_is_finite_where_blocks_add_nothing():
    h = torch.randn(4, 6, 10)
    hs = [h.clone().requires_grad_() for _ in range(5)]
    value = S.grouped_loss(hs, [0, 0, 1, 1])
    value.backward()
    assert value == 0 and all(torch.isfinite(x.grad).all() for x in hs)


def test_padded_clips_of_any_length_count_by_their_real_tokens_alone():
    hs, lengths = [torch.randn(3, 6, 8) for _ in range(5)], (6, 4, 1)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    real = [torch.stack([h[clip, :n].mean(0) for clip, n in enumerate(lengths)])[:, None] for h in hs]
    expected = slow_grouped(real, [0, 0, 1, 1])
    assert float(S.grouped_loss(hs, [0, 0, 1, 1], mask)) == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_count():
    hs, mask = [torch.randn(3, 6, 8) for _ in range(5)], torch.tensor([[True] * 4 + [False] * 2] * 3)
    other = [torch.where(mask[..., None], h, 9 * torch.randn_like(h)) for h in hs]
    losses = [S.grouped_loss(x, [0, 0, 1, 1], mask) for x in (hs, other)]
    assert torch.allclose(*losses, atol=1e-6)
    unmasked = S.grouped_loss(other, [0, 0, 1, 1])
    assert not torch.allclose(unmasked, losses[0], atol=1e-3), "negative control"


# --- its weight

def test_the_share_ramps_in_from_the_acceptance_and_follows_r():
    assert S.share(1.0, 0.15, 500, None, 100) == 0, "no groups yet"
    assert S.share(1.0, 0.15, 500, 500, 100) == 0, "the ramp begins"
    ramp = [S.share(0.8, 0.15, k, 500, 100) for k in (525, 550, 600, 900)]
    assert np.allclose(ramp, [0.25 * 0.12, 0.5 * 0.12, 0.12, 0.12], atol=1e-12)
    assert [S.share(r, 0.15, 900, 500, 100) for r in (0.0, 1.0)] == [0.0, 0.15]
    assert S.share(1.0, 0.15, 501, 500, 0) == 0.15, "no ramp"
    assert S.share(1.0, 0.0, 900, 500, 100) == 0, "neutral: share 0 is off"


def two_losses():
    """(losses fm and struct, parameters): fm knows both layers, struct the first alone."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)
    h = torch.tanh(first(torch.randn(6, 5)))
    parameters = [*first.parameters(), *second.parameters()]
    return second(h).square().mean(), (h.T @ h).square().mean(), parameters


def test_the_ratio_is_the_closed_form():
    a, b, c = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(5)
    fm, struct = (a**2).sum() + 3 * b.sum(), (a * c).sum()
    expected = c.norm() / torch.cat([2 * a.detach(), torch.full((3,), 3.0)]).norm()
    assert S.gradient_ratio(fm, struct, [a, b]) == pytest.approx(float(expected), rel=1e-5)
    assert S.gradient_ratio(fm, struct + 0 * b.sum(), [b]) == 0, "parameters that the loss does not depend on"


def test_the_ratio_scales_with_either_loss_and_gives_the_weight_of_a_share():
    fm, struct, parameters = two_losses()
    ratio = S.gradient_ratio(fm, struct, parameters)
    assert S.gradient_ratio(fm, 2 * struct, parameters) == pytest.approx(2 * ratio, rel=1e-5)
    assert S.gradient_ratio(2 * fm, struct, parameters) == pytest.approx(ratio / 2, rel=1e-5)
    for scale in (1.0, 1e-3, 1e3):
        mu = 0.15 / S.gradient_ratio(fm, scale * struct, parameters)
        weighed = S.gradient_ratio(fm, mu * scale * struct, parameters)
        assert weighed == pytest.approx(0.15, rel=1e-4), "whatever the scale of the loss"


def test_measuring_the_ratio_leaves_the_graph_alive_and_no_gradient_touched():
    fm, struct, parameters = two_losses()
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    S.gradient_ratio(fm, struct, parameters)
    assert (parameters[0].grad == 7).all() and all(p.grad is None for p in parameters[1:])
    (fm + struct).backward()  # the graph is still alive
    assert all(p.grad is not None for p in parameters)


def test_measured_ratios_are_averaged_geometrically():
    """log ratio is half what it was and half what is new: 4, 1, 16 -> 4, 2, 32^.5."""
    detector, found = S.GroupDetector(8), []
    assert detector.ratio is None
    for ratio in (4.0, 1.0, 16.0, 0.25):
        detector.take_ratio(ratio)
        found.append(detector.ratio)
    logs = np.log2([4.0, 1.0, 16.0, 0.25])
    eighths = np.array([[8, 0, 0, 0], [4, 4, 0, 0], [2, 2, 4, 0], [1, 1, 2, 4]])
    assert np.allclose(np.log2(found), eighths @ logs / 8)
    up, down = S.GroupDetector(8), S.GroupDetector(8)
    for factor in (10.0, 1.0):
        up.take_ratio(factor)
        down.take_ratio(1 / factor)
    assert up.ratio * down.ratio == pytest.approx(1), "ten times too much and a tenth weigh alike"
