"""Claims about the density of training timesteps."""
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

import sampler


@pytest.mark.parametrize("m, s, floor", [(0, 1, 0.1), (1, 1, 0.1), (-1, 0.5, 0.0), (2, 1.5, 0.3)])
def test_density_integrates_to_one(m, s, floor):
    total, _ = scipy.integrate.quad(lambda t: float(sampler.pdf(torch.tensor(t, dtype=torch.float64), m, s, floor)), 0, 1, limit=200)
    assert abs(total - 1) < 1e-6


def test_density_without_floor_is_scipys_logit_normal():
    """p(t) = N(logit t; m, s) / (t (1 - t))."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    exact = scipy.stats.norm(0.7, 1.3).pdf((t / (1 - t)).log().numpy()) / (t * (1 - t)).numpy()
    assert abs(sampler.pdf(t, 0.7, 1.3, floor=0.0).numpy() - exact).max() < 1e-10


def _ks(m_drawn, m_claimed):
    t = sampler.sample(20_000, m_drawn, 1.0, 0.1, torch.Generator().manual_seed(3)).double().numpy()
    cdf = lambda x: 0.9 * scipy.stats.norm(m_claimed, 1).cdf(scipy.special.logit(x)) + 0.1 * x
    return scipy.stats.kstest(t, cdf).pvalue


def test_draws_follow_the_density():
    assert _ks(1.0, 1.0) > 0.01


def test_negative_control_a_shifted_density_is_rejected():
    assert _ks(1.0, 0.9) < 1e-6


def test_importance_weight_restores_the_reference_expectation():
    """E_p[w(t) f(t)] = E_ref[f(t)], here for f(t) = t^2; without the weight the two differ."""
    t = sampler.sample(400_000, 1.0, 1.0, 0.1, torch.Generator().manual_seed(0)).double()
    ref, _ = scipy.integrate.quad(lambda x: x * x * float(sampler.pdf(torch.tensor(x, dtype=torch.float64))), 0, 1)
    weighted = float((sampler.weight(t, 1.0) * t**2).mean())
    assert abs(weighted - ref) < 0.005
    assert abs(float((t**2).mean()) - ref) > 0.1


def test_centre_zero_is_the_reference_bitwise():
    draw = lambda **k: sampler.sample(100, generator=torch.Generator().manual_seed(5), **k)
    assert torch.equal(draw(), draw(m=sampler.REFERENCE_M))


def test_every_setting_consumes_the_same_randomness():
    """Or switching the density would change the noise drawn after it."""
    after = []
    for m, floor in ((0.0, 0.1), (1.0, 0.5)):
        g = torch.Generator().manual_seed(1)
        sampler.sample(16, m, 1.0, floor, g)
        after.append(torch.rand(4, generator=g))
    assert torch.equal(*after)


def test_larger_centre_means_more_noise():
    mean = [float(sampler.sample(50_000, m, generator=torch.Generator().manual_seed(0)).mean()) for m in (-1.0, 0.0, 1.0)]
    assert mean[0] < mean[1] - 0.1 < mean[2] - 0.2 and abs(mean[1] - 0.5) < 0.01


def test_the_centre_moves_from_early_to_late_with_the_regime():
    assert [sampler.centre(r, 2.0, 1.0) for r in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]
    assert all(abs(sampler.centre(r, 1.5, 1.5) - 1.5) < 1e-12 for r in np.linspace(0, 1, 11)), "equal ends: the constant mode"


def test_moments_are_scipys():
    """Mean and variance of the mixture, by quadrature of scipy's normal through the sigmoid."""
    t = sampler.sample(400_000, 0.8, 1.2, 0.1, torch.Generator().manual_seed(1)).double()
    moment = lambda k: 0.9 * scipy.integrate.quad(lambda z: scipy.special.expit(z) ** k * scipy.stats.norm(0.8, 1.2).pdf(z), -12, 12)[0] + 0.1 / (k + 1)
    assert abs(float(t.mean()) - moment(1)) < 2e-3 and abs(float((t**2).mean()) - moment(2)) < 2e-3
