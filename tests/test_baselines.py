"""Claims about the baselines of super-resolution."""
import numpy as np
from fabricated import gaussian

from parts.band_limit import band_limit
from parts.baselines import PENALTIES, SpectrumBaseline
from parts.metrics import log_power, lsd


def test_ridge_is_the_normal_equations_and_beats_the_mean(waves):
    base = SpectrumBaseline(waves[:32], 2_000)
    x = np.concatenate([log_power(band_limit(wave, 2_000))[:, :256] for wave in waves[:32]])
    y = np.concatenate([log_power(wave)[:, 256:] for wave in waves[:32]])
    x, y = x.astype(np.float64), y.astype(np.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    # The penalty is the one that errs least on the last tenth of the frames, which it was not fitted on.
    fitted = np.arange(len(x)) < 0.9 * len(x)
    errors = []
    for penalty in PENALTIES:
        gram = x[fitted].T @ x[fitted] + penalty * fitted.sum() * np.eye(256)
        error = x[~fitted] @ np.linalg.solve(gram, x[fitted].T @ y[fitted]) - y[~fitted]
        errors.append(np.mean(error**2))
    assert base.penalty == PENALTIES[int(np.argmin(errors))] and max(errors) > 1.05 * min(errors)
    # Least squares with rows sqrt(lambda) I added is ridge regression.
    extra = np.sqrt(base.penalty * len(x)) * np.eye(256)
    zeros = np.zeros((256, y.shape[1]))
    augmented = np.linalg.lstsq(np.vstack([x, extra]), np.vstack([y, zeros]), rcond=None)[0]
    assert np.allclose(base.weights, augmented, atol=1e-6)

    def error(kind):
        errors = []
        for wave in waves[32:40]:
            predicted = base.predict(band_limit(wave, 2_000), kind)
            errors.append(np.abs(predicted - log_power(wave)[:, 256:]).mean())
        return np.mean(errors)

    assert error("ridge") < error("mean")


def test_rendered_noise_has_the_predicted_mean_log_spectrum_and_keeps_the_low_band():
    """For stationary noise the mean baseline knows the truth, so it must reach the sampler's floor of
    0.79."""
    base = SpectrumBaseline([gaussian(seed=k) for k in range(6)], 2_000)
    x = gaussian(seed=99)
    y = base.render(band_limit(x, 2_000), "mean", 0)
    d = lsd(log_power(x), log_power(y), 2_000)
    assert abs(d["lsd_hf"] - 0.79) < 0.05
    assert d["lsd_lf"] < 0.25
