"""Claims about other people's samplers and regularizers."""
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from fabricated import generator_of, left_after

from parts import peers
from sampler import FLOOR, LogitNormal

FIRST = LogitNormal(1.5)
MIDDLES = (torch.arange(peers.BINS) + 0.5) / peers.BINS


# --- curriculum

def density_of(k: int, K: int = 1_000) -> LogitNormal:
    return LogitNormal(*peers.curriculum(k, K, FLOOR))


def test_the_curriculum_switches_at_half_of_the_run():
    noisy = LogitNormal(0.8, 1.0, FLOOR)
    assert all(density_of(k) == noisy for k in (1, 250, 500))
    assert all(density_of(k).u == 1.0 for k in (501, 750, 1_000))
    assert density_of(1, 3) == noisy and density_of(2, 3).u == 1.0, "of an odd number of steps"


def test_after_its_switch_the_curriculum_is_uniform_and_before_it_is_not():
    t = torch.linspace(0.001, 0.999, 99)
    assert torch.equal(density_of(501).pdf(t), torch.ones(99))
    late, early = (density_of(k).sample(20_000, generator_of(2)).double().numpy() for k in (501, 500))
    assert scipy.stats.kstest(late, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(early, "uniform").pvalue < 1e-6, "negative control"
    assert early.mean() > 0.6, "nearer to noise"


# --- piecewise constant densities

SOME = [peers.Binned((0.1, 0.2, 0.3, 0.4), 0.1), peers.Binned((3.0, 0.0, 1.0), 0.0),
        peers.Binned(tuple(np.random.default_rng(0).random(peers.BINS).tolist()), 0.25),
        peers.Binned((1.0,), 0.1), peers.Binned((0.0, 1.0), 1.0)]


@pytest.mark.parametrize("density", SOME)
def test_a_binned_density_integrates_to_one_and_is_the_shares_over_a_floor(density):
    n = len(density.shares)
    t = (torch.arange(1_000 * n, dtype=torch.float64) + 0.5) / (1_000 * n)
    at = density.pdf(t).double().reshape(n, 1_000)
    shares = np.array(density.shares) / sum(density.shares)
    assert abs(float(at.mean()) - 1) < 1e-6
    assert np.allclose(at[:, 0], (1 - density.u) * n * shares + density.u, atol=1e-6)
    assert torch.equal(at, at[:, :1].expand_as(at)), "constant in each bin"
    assert torch.isfinite(density.pdf(torch.tensor([0.0, 1.0]))).all()


def p_of_counts(drawn: peers.Binned, claimed: peers.Binned, per_bin: int = 4) -> float:
    """p of the counts of draws in quarters of bins against the claimed density, by chi square."""
    n = per_bin * len(claimed.shares)
    t = drawn.sample(50_000, generator_of(3))
    counts = torch.histc(t, n, 0, 1).numpy()
    expected = claimed.pdf((torch.arange(n) + 0.5) / n).double().numpy() / n
    possible = expected > 0
    assert counts[~possible].sum() == 0, "nothing where the density is 0"
    expected = expected[possible] / expected[possible].sum() * counts.sum()
    return scipy.stats.chisquare(counts[possible], expected).pvalue


@pytest.mark.parametrize("density", SOME)
def test_draws_of_a_binned_density_follow_it(density):
    assert p_of_counts(density, density) > 1e-3
    t = density.sample(50_000, generator_of(0))
    assert t.dtype == torch.float32 and 0 < t.min() and t.max() < 1


def test_negative_control_other_shares_or_another_floor_are_rejected():
    for claimed in (peers.Binned((0.12, 0.2, 0.28, 0.4), 0.1), peers.Binned((0.1, 0.2, 0.3, 0.4), 0.2)):
        assert p_of_counts(SOME[0], claimed) < 1e-6


@pytest.mark.parametrize("density", SOME)
def test_a_binned_density_consumes_what_a_logit_normal_does(density):
    """Or switching the density would change the noise drawn after it."""
    assert all(map(torch.equal, left_after(LogitNormal()), left_after(density)))


def test_equal_shares_and_a_floor_of_one_are_both_uniform():
    for density in (peers.Binned((0.2,) * 5, 0.0), peers.Binned((1.0, 0.0), 1.0)):
        t = density.sample(20_000, generator_of(4)).double().numpy()
        assert scipy.stats.kstest(t, "uniform").pvalue > 0.01


# --- the density that the running loss asks for

def watched(loss_of, steps=300, batch=256, peer=None, first_step=1) -> peers.InfoNoise:
    """InfoNoise that has seen `steps` batches of its own timesteps with the loss loss_of(t)."""
    peer, generator = peer or peers.InfoNoise(FIRST), generator_of(5)
    for k in range(first_step, first_step + steps):
        t = peer.density.sample(batch, generator)
        peer.observe(t, loss_of(t), k)
    return peer


def asked_for(rate) -> np.ndarray:
    """Exact density in the middle of each bin: a floor, and the rest in proportion to `rate` there."""
    rate = np.asarray(rate, float)
    return (1 - FLOOR) * rate / rate.mean() + FLOOR


PROFILES = {
    "constant": lambda t: torch.full_like(t, 0.7),
    "gaussian data": lambda t: 1 / ((1 - t) ** 2 + t**2),
    "falling": lambda t: 2 - t,
    "a dip": lambda t: 1 - 0.8 * torch.exp(-((t - 0.6) ** 2) / 0.02),
}


@pytest.mark.parametrize("name", PROFILES)
def test_the_density_converges_to_t_times_1_less_t_times_the_loss_over_a_floor(name):
    profile = PROFILES[name]
    density = watched(profile).density
    # The loss of a bin is its mean over where draws fall in it: the profile's mean over the bin.
    fine = profile((torch.arange(100 * peers.BINS) + 0.5) / (100 * peers.BINS)).reshape(peers.BINS, 100)
    expected = asked_for(MIDDLES * (1 - MIDDLES) * fine.mean(1))
    assert np.allclose(density.pdf(MIDDLES), expected, rtol=0.05)
    assert abs(float(density.pdf(MIDDLES).mean()) - 1) < 1e-5
    if name != "constant":
        without = asked_for(MIDDLES * (1 - MIDDLES))
        assert not np.allclose(density.pdf(MIDDLES), without, rtol=0.1), "negative control: no loss"


def test_a_loss_that_is_constant_in_each_bin_is_recovered_exactly():
    profile = torch.rand(peers.BINS, generator=generator_of(1)) + 0.1
    density = watched(lambda t: profile[(t * peers.BINS).long()], steps=100).density
    assert np.allclose(density.pdf(MIDDLES), asked_for(MIDDLES * (1 - MIDDLES) * profile), rtol=1e-4)


def test_noise_in_the_losses_is_averaged_out_and_an_old_profile_is_forgotten():
    generator = generator_of(9)

    def noisy(t):
        return (2 - t) * torch.empty_like(t).exponential_(generator=generator)

    density = watched(noisy, steps=600, batch=1_024).density
    expected = asked_for(MIDDLES * (1 - MIDDLES) * (2 - MIDDLES))
    assert np.allclose(density.pdf(MIDDLES), expected, rtol=0.4)
    changed = watched(PROFILES["a dip"], peer=watched(PROFILES["falling"]), first_step=301)
    straight = watched(PROFILES["a dip"])
    assert np.allclose(changed.density.pdf(MIDDLES), straight.density.pdf(MIDDLES), rtol=0.03)


def test_the_running_loss_is_an_exponential_mean_over_the_samples_of_a_bin():
    """One sample a step, all into the same bin, against the recursion written down again."""
    peer, losses = peers.InfoNoise(FIRST), np.random.default_rng(0).random(200)
    total = weight = 0.0
    for k, loss in enumerate(losses, 1):
        peer.observe(torch.tensor([0.512]), torch.tensor([loss]), k)
        total, weight = peers.MEMORY * total + loss, peers.MEMORY * weight + 1
    assert np.allclose(peer.sums[:, 10], [total, weight], rtol=1e-4)
    others = torch.arange(peers.BINS) != 10
    assert (peer.sums[:, others] == 0).all(), "other bins remember nothing"


def test_until_every_bin_has_been_drawn_it_is_the_first_density():
    """Neutral: bitwise the draws of the logit-normal. Nineteen bins of twenty are not enough."""
    peer = peers.InfoNoise(FIRST)
    for k in range(1, 51):
        peer.observe(MIDDLES[:-1], torch.ones(peers.BINS - 1), k)
        assert peer.density is FIRST
    drawn = (density.sample(100, generator_of(0)) for density in (peer.density, FIRST))
    assert torch.equal(*drawn)
    peer.observe(torch.tensor([1.0]), torch.ones(1), 59)
    assert peer.density is FIRST, "it is renewed every ten steps"
    peer.observe(MIDDLES, torch.ones(peers.BINS), 60)
    assert isinstance(peer.density, peers.Binned) and peer.density.u == FIRST.u


@pytest.mark.parametrize("steps", [0, 3, 57])
def test_its_state_goes_through_a_file_exactly(steps, tmp_path):
    """Before all bins are filled and after: the same density, and the same one twenty steps later."""
    whole, again = watched(PROFILES["falling"], steps), peers.InfoNoise(FIRST)
    torch.save(whole.state_dict(), tmp_path / "s.pt")
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert again.density == whole.density and torch.equal(again.sums, whole.sums)
    assert (again.density is FIRST) == (steps < 10)
    for peer in (whole, again):
        watched(PROFILES["a dip"], 20, peer=peer, first_step=steps + 1)
    assert again.density == whole.density and again.density is not FIRST
    assert torch.equal(again.sums, whole.sums)


# --- why t (1 - t) L(t): the derivation, by numbers

def derivative(f, t, h=1e-5):
    return (f(t + h) - f(t - h)) / (2 * h)


def snr(t):
    return ((1 - t) / t) ** 2


def test_the_rate_over_its_weight_is_t_times_1_less_t_times_the_loss():
    """rho = |d gamma / dt| / 2 * t^2 L and w = 1 / t^2, the derivative by differences."""
    t = np.linspace(0.05, 0.95, 19)
    for L in (np.ones(19), 2 - t, np.random.default_rng(0).random(19)):
        rho, w = np.abs(derivative(snr, t)) / 2 * t**2 * L, 1 / t**2
        assert np.allclose(rho / w, t * (1 - t) * L, rtol=1e-6)
        assert not np.allclose(rho, t * (1 - t) * L, rtol=0.1), "negative control: without the weight"


def test_the_error_of_x0_is_t_squared_times_that_of_the_velocity():
    x0, eps, v_hat = (torch.randn(4, 6, 3, dtype=torch.float64) for _ in range(3))
    for t in (0.1, 0.5, 1.0):
        x_t = (1 - t) * x0 + t * eps
        error = (x0 - (x_t - t * v_hat)).square().mean()
        assert torch.allclose(error, t**2 * (v_hat - (eps - x0)).square().mean())


def test_for_gaussian_data_it_is_the_derivative_of_the_mutual_information():
    """x0 ~ N(0, 1): I = log(1 + gamma) / 2, known without I-MMSE; the loss of the best velocity is
    L = 1 / ((1 - t)^2 + t^2). InfoNoise, given L alone, comes to |dI / dt| t^2."""
    def information(t):
        return np.log1p(snr(t)) / 2

    t = MIDDLES.double().numpy()
    rate = np.abs(derivative(information, t))
    assert np.allclose(rate * t**2, t * (1 - t) / ((1 - t) ** 2 + t**2), rtol=1e-6)
    density = watched(PROFILES["gaussian data"]).density
    assert np.allclose(density.pdf(MIDDLES), asked_for(rate * t**2), rtol=0.02)


# --- losses on the blocks

LOSSES = (peers.dispersive_loss, peers.diversity_loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_finite_where_blocks_add_nothing_or_are_nothing(loss):
    for h in (torch.randn(4, 6, 10), torch.zeros(4, 6, 10)):
        hs = [h.clone().requires_grad_() for _ in range(5)]
        value = loss(hs, [0, 0, 1, 1])
        value.backward()
        gradients = [x.grad for x in hs if x.grad is not None]
        assert torch.isfinite(value) and gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_does_not_count(loss):
    hs = [torch.randn(3, 6, 8) for _ in range(5)]
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6, [True] + [False] * 5])
    other = [torch.where(mask[..., None], h, 9 * torch.randn_like(h)) for h in hs]
    assert torch.allclose(loss(hs, None, mask), loss(other, None, mask), atol=1e-6)
    assert not torch.allclose(loss(hs), loss(other), atol=1e-3), "negative control: without the mask"
    everything = torch.ones(3, 6, dtype=torch.bool)
    assert torch.allclose(loss(hs, None, everything), loss(hs), atol=1e-6), "neutral: all is real"


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_of_blocks_are_nothing_to_them(loss):
    hs = [torch.randn(3, 6, 8) for _ in range(5)]
    assert torch.equal(loss(hs, [0, 0, 1, 1]), loss(hs, [0, 1, 2, 0]))


def test_the_dispersive_loss_is_the_slow_loop_and_bounded():
    hs = [torch.randn(5, 3, 4) for _ in range(9)]
    z = hs[2].flatten(1)
    pairs = itertools.product(range(5), repeat=2)
    distances = [float(((z[i] - z[j]) ** 2).sum()) / (12 * 0.5) for i, j in pairs]
    slow = np.log(np.mean(np.exp(-np.array(distances))))
    assert abs(float(peers.dispersive_loss(hs)) - slow) < 1e-5 and -np.log(5) <= slow <= 0
    assert abs(float(peers.dispersive_loss([torch.ones(5, 3, 4)] * 9))) < 1e-6
    far_apart = [10 * h for h in hs]
    assert float(peers.dispersive_loss(far_apart)) == pytest.approx(-np.log(5), abs=1e-3)


def slow_diversity(hs, mask) -> float:
    """Block by block, clip by clip, token by token."""
    real = [(clip, t) for clip in range(len(mask)) for t in range(mask.shape[1]) if mask[clip, t]]
    terms = []
    for a, b in itertools.combinations(hs[1:], 2):
        means = [torch.stack([h[place] for place in real]).mean(0) for h in (a, b)]
        tokens = [float(F.cosine_similarity(a[place], b[place], dim=0)) for place in real]
        terms.append((float(F.cosine_similarity(*means, dim=0)) + abs(np.mean(tokens))) / 2)
    return np.mean(terms)


def test_the_diversity_loss_is_the_slow_loop_with_and_without_padding():
    """h_0, the embedding, is no block's output and has no part in it."""
    hs = [torch.randn(3, 5, 7) + 0.5 * torch.randn(7) for _ in range(5)]
    everything, ragged = torch.ones(3, 5), torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    assert abs(float(peers.diversity_loss(hs)) - slow_diversity(hs, everything)) < 1e-5
    assert abs(float(peers.diversity_loss(hs, None, ragged)) - slow_diversity(hs, ragged)) < 1e-5
    another = [torch.randn(3, 5, 7), *hs[1:]]
    assert torch.equal(peers.diversity_loss(another), peers.diversity_loss(hs))


def in_channels_of_their_own(blocks: int = 3):
    """hs of blocks whose outputs share no channel."""
    hs = [torch.randn(4, 6, 3 * blocks)]
    for block in range(blocks):
        h = torch.zeros(4, 6, 3 * blocks)
        h[..., 3 * block : 3 * block + 3] = torch.randn(4, 6, 3)
        hs.append(h)
    return hs


def test_the_diversity_loss_is_1_for_identical_blocks_and_0_for_orthogonal_ones():
    h = torch.randn(4, 6, 9)
    assert float(peers.diversity_loss([h, h, 2 * h, 0.5 * h])) == pytest.approx(1, abs=1e-5)
    assert abs(float(peers.diversity_loss(in_channels_of_their_own()))) < 1e-6
    partly = [0.5 * h + x for x in in_channels_of_their_own()]
    assert 0.05 < float(peers.diversity_loss(partly)) < 0.95, "in between otherwise"


def test_the_diversity_loss_ends_at_minus_a_half():
    """Means opposed while tokens are orthogonal on average: one long token each way, one short token
    alike. Of blocks that are opposed at every token the halves cancel: 0."""
    e = torch.tensor([1.0, 0.0, 0.0])
    one, other = torch.stack([1e3 * e, 1e-3 * e]), torch.stack([-1e3 * e, 1e-3 * e])
    value = float(peers.diversity_loss([one[None]] + [one[None], other[None]]))
    assert value == pytest.approx(-0.5, abs=1e-4)
    h = torch.randn(4, 6, 9)
    assert abs(float(peers.diversity_loss([h, h, -h]))) < 1e-5
    for _ in range(20):
        assert -0.5 <= float(peers.diversity_loss([torch.randn(2, 3, 4) for _ in range(4)])) <= 1


def test_gradient_descent_on_the_diversity_loss_takes_identical_blocks_apart():
    generator = generator_of(0)
    h = torch.randn(1, 4, 6, 9, generator=generator)
    hs = (h + 0.1 * torch.randn(4, 4, 6, 9, generator=generator)).requires_grad_()
    before = peers.diversity_loss(list(hs)).item()
    optimizer = torch.optim.Adam([hs], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = peers.diversity_loss(list(hs))
        loss.backward()
        optimizer.step()
    assert before > 0.9 and loss.item() < 0.1
