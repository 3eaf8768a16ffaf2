"""Claims about the density of training timesteps."""
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from fabricated import generator_of, left_after

import sampler
from parts import peers
from sampler import LogitNormal

DENSITIES = [LogitNormal(), LogitNormal(1.0), LogitNormal(-1.0, 0.5, 0.0), LogitNormal(2.0, 1.5, 0.3),
             LogitNormal(0.8, 1.0, 1.0)]


# --- the density

@pytest.mark.parametrize("density", DENSITIES)
def test_density_integrates_to_one(density):
    def at(t: float) -> float:
        return float(density.pdf(torch.tensor(t, dtype=torch.float64)))

    total, _ = scipy.integrate.quad(at, 0, 1, limit=200)
    assert abs(total - 1) < 1e-6


def test_density_without_floor_is_scipys_logit_normal():
    """p(t) = N(logit t; m, s) / (t (1 - t))."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    exact = scipy.stats.norm(0.7, 1.3).pdf((t / (1 - t)).log().numpy()) / (t * (1 - t)).numpy()
    assert abs(LogitNormal(0.7, 1.3, 0.0).pdf(t).numpy() - exact).max() < 1e-10
    mixed = LogitNormal(0.7, 1.3, 0.25).pdf(t).numpy()
    assert abs(mixed - (0.75 * exact + 0.25)).max() < 1e-10, "the floor: a share of it is uniform"


def test_a_floor_of_one_is_the_uniform_density():
    assert torch.equal(LogitNormal(2.0, 0.5, 1.0).pdf(torch.linspace(0.001, 0.999, 99)), torch.ones(99))


# --- draws from it

@pytest.mark.parametrize("density", DENSITIES)
def test_draws_are_bitwise_those_of_the_formula(density):
    """t = sigmoid(m + s n), or uniform with probability u, from the same generator."""
    generator = generator_of(5)
    normal = torch.randn(1_000, generator=generator)
    uniform, pick = (torch.rand(1_000, generator=generator) for _ in range(2))
    t = torch.sigmoid(density.m + density.s * normal)
    t[pick < density.u] = uniform[pick < density.u]
    t = t.clamp(1e-5, 1 - 1e-5)
    drawn = density.sample(1_000, generator_of(5))
    assert torch.equal(drawn, t) and drawn.dtype == torch.float32
    assert not torch.equal(density.sample(1_000, generator_of(6)), t), "negative control: another seed"


def test_the_defaults_are_the_reference_density():
    """m = 0, s = 1, a tenth uniform: that of the mode `off`."""
    assert LogitNormal() == LogitNormal(0.0, 1.0, 0.1) and sampler.FLOOR == 0.1


def test_draws_stay_inside_the_unit_interval_however_far_the_centre():
    for m in (-50.0, 50.0):
        t = LogitNormal(m, 3.0).sample(10_000, generator_of(0))
        assert t.min() > 0 and t.max() < 1 and torch.isfinite(LogitNormal(m, 3.0).pdf(t)).all()


def p_of_kolmogorov_smirnov(drawn: LogitNormal, claimed: LogitNormal) -> float:
    t = drawn.sample(20_000, generator_of(3)).double().numpy()

    def cumulative(x):
        normal = scipy.stats.norm(claimed.m, claimed.s)
        return (1 - claimed.u) * normal.cdf(scipy.special.logit(x)) + claimed.u * x

    return scipy.stats.kstest(t, cumulative).pvalue


@pytest.mark.parametrize("density", DENSITIES)
def test_draws_follow_the_density(density):
    assert p_of_kolmogorov_smirnov(density, density) > 0.01


OTHERS = [LogitNormal(0.9), LogitNormal(1.0, 1.1), LogitNormal(1.0, 1.0, 0.2)]


@pytest.mark.parametrize("claimed", OTHERS)
def test_negative_control_another_centre_width_or_floor_is_rejected(claimed):
    assert p_of_kolmogorov_smirnov(LogitNormal(1.0), claimed) < 1e-3


BINNED = peers.Binned((0.5, 0.0, 0.25, 0.25), 0.1)


@pytest.mark.parametrize("density", [*DENSITIES[1:], BINNED, peers.InfoNoise(DENSITIES[1]).density])
def test_every_density_consumes_the_same_randomness(density):
    """Or switching the density would change the noise drawn after it."""
    assert all(map(torch.equal, left_after(LogitNormal()), left_after(density)))


def test_negative_control_a_density_that_draws_less_shifts_what_follows():
    """One without a floor that saves itself the two uniform draws."""
    after = []
    for draw in (LogitNormal(u=0.0).sample, lambda n, g: torch.sigmoid(torch.randn(n, generator=g))):
        generator = generator_of(1)
        draw(17, generator)
        after.append(torch.rand(4, generator=generator))
    assert not torch.equal(*after)


# --- its centre and width

def test_larger_centre_means_more_noise():
    mean = [float(LogitNormal(m).sample(50_000, generator_of(0)).mean()) for m in (-1.0, 0.0, 1.0)]
    assert mean[0] < mean[1] - 0.1 < mean[2] - 0.2 and abs(mean[1] - 0.5) < 0.01


def test_a_wider_density_has_more_of_both_ends():
    ends = []
    for s in (0.5, 1.0, 2.0):
        t = LogitNormal(0.0, s).sample(50_000, generator_of(0))
        ends.append((float((t < 0.1).float().mean()), float((t > 0.9).float().mean())))
    assert ends == sorted(ends) and ends[0][1] < ends[1][1] < ends[2][1]


def test_the_density_moves_from_early_to_late_in_a_line_with_the_regime():
    early, late = LogitNormal(2.0, 0.5), LogitNormal(0.75, 1.5)
    assert sampler.between(0.0, early, late) == early and sampler.between(1.0, early, late) == late
    assert sampler.between(1.0, LogitNormal(2.0, 0.5, 0.3), late).u == 0.3, "the floor stays"
    for r in np.linspace(0, 1, 11):
        between = sampler.between(r, early, late)
        assert math.isclose(between.m, 2.0 - 1.25 * r) and math.isclose(between.s, 0.5 + r)
        assert between.u == sampler.FLOOR, "no noise level is forgotten at any r"


def test_between_equal_ends_lies_the_constant_density():
    """Neutral: the mode `adaptive` with equal ends is the mode `constant`, whatever r does."""
    for r in (0.0, 0.25, 0.5, 1.0):
        assert sampler.between(r, LogitNormal(1.5), LogitNormal(1.5)) == LogitNormal(1.5)
    end = LogitNormal(1.7, 0.9)
    odd = [sampler.between(r, end, end) for r in np.linspace(0, 1, 101)]
    assert all(abs(x.m - 1.7) < 1e-12 and abs(x.s - 0.9) < 1e-12 for x in odd)
