"""Claims about the density of training timesteps."""
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

import sampler


def density(t: float, *settings) -> float:
    return float(sampler.pdf(torch.tensor(t, dtype=torch.float64), *settings))


def draws(n: int, *settings, seed: int) -> torch.Tensor:
    return sampler.sample(n, *settings, generator=torch.Generator().manual_seed(seed))


# --- the density

@pytest.mark.parametrize("m, s, floor", [(0, 1, 0.1), (1, 1, 0.1), (-1, 0.5, 0.0), (2, 1.5, 0.3)])
def test_density_integrates_to_one(m, s, floor):
    total, _ = scipy.integrate.quad(density, 0, 1, (m, s, floor), limit=200)
    assert abs(total - 1) < 1e-6


def test_density_without_floor_is_scipys_logit_normal():
    """p(t) = N(logit t; m, s) / (t (1 - t))."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    exact = scipy.stats.norm(0.7, 1.3).pdf((t / (1 - t)).log().numpy()) / (t * (1 - t)).numpy()
    assert abs(sampler.pdf(t, 0.7, 1.3, floor=0.0).numpy() - exact).max() < 1e-10


# --- draws from it

def p_of_kolmogorov_smirnov(m_drawn, m_claimed) -> float:
    t = draws(20_000, m_drawn, 1.0, 0.1, seed=3).double().numpy()

    def cumulative(x):
        return 0.9 * scipy.stats.norm(m_claimed, 1).cdf(scipy.special.logit(x)) + 0.1 * x

    return scipy.stats.kstest(t, cumulative).pvalue


def test_draws_follow_the_density():
    assert p_of_kolmogorov_smirnov(1.0, 1.0) > 0.01


def test_negative_control_a_shifted_density_is_rejected():
    assert p_of_kolmogorov_smirnov(1.0, 0.9) < 1e-6


def test_moments_are_scipys():
    """Mean and variance of the mixture, by quadrature of scipy's normal through the sigmoid."""
    t = draws(400_000, 0.8, 1.2, 0.1, seed=1).double()

    def moment(k):
        def integrand(z):
            return scipy.special.expit(z) ** k * scipy.stats.norm(0.8, 1.2).pdf(z)

        return 0.9 * scipy.integrate.quad(integrand, -12, 12)[0] + 0.1 / (k + 1)

    assert abs(float(t.mean()) - moment(1)) < 2e-3
    assert abs(float((t**2).mean()) - moment(2)) < 2e-3


def test_centre_zero_is_the_reference_bitwise():
    assert torch.equal(draws(100, seed=5), draws(100, sampler.REFERENCE_M, seed=5))


def test_every_setting_consumes_the_same_randomness():
    """Or switching the density would change the noise drawn after it."""
    after = []
    for m, floor in ((0.0, 0.1), (1.0, 0.5)):
        generator = torch.Generator().manual_seed(1)
        sampler.sample(16, m, 1.0, floor, generator)
        after.append(torch.rand(4, generator=generator))
    assert torch.equal(*after)


# --- its centre

def test_larger_centre_means_more_noise():
    mean = [float(draws(50_000, m, seed=0).mean()) for m in (-1.0, 0.0, 1.0)]
    assert mean[0] < mean[1] - 0.1 < mean[2] - 0.2 and abs(mean[1] - 0.5) < 0.01


def test_the_centre_moves_from_early_to_late_with_the_regime():
    assert [sampler.centre(r, 2.0, 1.0) for r in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]
    with_equal_ends = [sampler.centre(r, 1.5, 1.5) for r in np.linspace(0, 1, 11)]
    assert all(abs(m - 1.5) < 1e-12 for m in with_equal_ends), "the constant mode"
