"""Claims about the regime variable."""
import json

import numpy as np
import pytest
import scipy.stats
import torch

import regime as R

K = 8_192


def run(curve, noise=0.005, seed=0) -> tuple[R.Regime, np.ndarray, np.ndarray]:
    """Feed a discrepancy curve -> (regime, probe steps, r at each)."""
    rng, regime = np.random.default_rng(seed), R.Regime("slope", K)
    steps, found = np.array(R.probe_steps(K)), []
    for k in steps:
        regime.update(k, curve(k) + noise * rng.standard_normal())
        found.append(regime.r(k))
    return regime, steps, np.array(found)


# --- curves with a known answer

def two_phase(k):
    return 1 - 0.08 * np.log2(min(k, 512))


def exponential(k):
    return 0.3 + 0.7 * np.exp(-k / 300)


def falling_for_ever(k):
    return 1 - 0.05 * np.log2(k)


def flat(k):
    return 0.8


def rising(k):
    return 0.5 + 0.02 * np.log2(k)


# --- the slope

def test_probes_are_eight_a_doubling_from_16_to_the_end():
    steps = R.probe_steps(K)
    assert steps[0] == 16 and steps[-1] == K
    assert steps == sorted(set(steps)) and steps[8::8] == [16 * 2**j for j in range(1, 10)]
    assert R.probe_steps(10) == [] and max(R.probe_steps(1_000)) <= 1_000


def test_slope_and_its_error_are_scipys_and_those_of_the_normal_equations():
    """Slope and error by scipy, by numpy's polynomial fit, and written out: s^2 (X^T X)^-1."""
    k, D = np.array(R.probe_steps(K))[:9], np.random.default_rng(0).standard_normal(9)
    fit = scipy.stats.linregress(np.log2(k), D)
    (slope, _), covariance = np.polyfit(np.log2(k), D, 1, cov=True)
    X = np.stack([np.log2(k), np.ones(9)], 1)
    inverse = np.linalg.inv(X.T @ X)
    by_hand = inverse @ X.T @ D
    variance = ((D - X @ by_hand) ** 2).sum() / (9 - 2)
    for s, error in ((-fit.slope, fit.stderr), (-slope, covariance[0, 0] ** 0.5),
                     (-by_hand[0], (variance * inverse[0, 0]) ** 0.5)):
        assert np.allclose(R.slope(k, D), (s, error))
    assert R.slope(k, 1 - 0.25 * np.log2(k))[0] == pytest.approx(0.25), "positive when D falls"


# --- r follows it

@pytest.mark.parametrize("curve", [two_phase, exponential, falling_for_ever, flat, rising])
def test_r_stays_in_the_unit_interval_and_ignores_the_scale_of_D(curve):
    _, _, r = run(curve)
    _, _, again = run(lambda k: 4 * curve(k), noise=0.02)
    assert ((0 <= r) & (r <= 1)).all() and np.allclose(r, again, atol=1e-9)


def found_in_time(curve, seeds=100) -> float:
    """Share of seeds whose r passes 0.5 within half a doubling of the switch at step 512."""
    crossed = []
    for seed in range(seeds):
        _, steps, r = run(curve, seed=seed)
        late = np.flatnonzero((r > 0.5) & (steps > 64))
        crossed.append(np.log2(steps[late[0]] / 512) if len(late) else np.inf)
    return np.mean(np.abs(crossed) <= 0.5)


@pytest.mark.parametrize("after", [0.0, 0.01])
def test_a_planted_switch_is_found_within_half_a_doubling(after):
    """D falls by 0.08 a doubling until step 512, and by 0 or 0.01 from there."""
    def curve(k):
        return two_phase(k) - after * np.log2(max(k, 512) / 512)

    assert found_in_time(curve) >= 0.95
    assert run(curve)[2][-1] > 0.7


def test_negative_control_a_longer_memory_finds_the_switch_too_late(monkeypatch):
    monkeypatch.setattr(R, "FOLLOWED_WINDOW", R.TESTED_WINDOW)
    monkeypatch.setattr(R, "NEWEST_SHARE", 0.3)
    assert found_in_time(two_phase, 20) == 0


@pytest.mark.parametrize("curve", [flat, rising])
def test_flat_and_rising_curves_give_no_signal_and_the_clock(curve):
    results = [run(curve, seed=seed) for seed in range(40)]
    assert np.mean([regime.no_signal for regime, _, _ in results]) >= 0.95
    _, steps, r = next(result for result in results if result[0].no_signal)
    late = steps >= 0.15 * K
    assert r[-1] == 1.0 and np.allclose(r[late], steps[late] / K)


def test_negative_control_without_significance_noise_would_be_a_signal(monkeypatch):
    monkeypatch.setattr(R, "MIN_STANDARD_ERRORS", 0.0)
    monkeypatch.setattr(R, "MIN_RELATIVE", 0.0)
    assert not any(run(flat, seed=seed)[0].no_signal for seed in range(10))


def test_negative_control_a_slope_of_the_wrong_sign_sees_no_fall(monkeypatch):
    right = R.slope

    def wrong_sign(k, D):
        s, standard_error = right(k, D)
        return -s, standard_error

    monkeypatch.setattr(R, "slope", wrong_sign)
    assert run(two_phase)[0].no_signal


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="step 16"):
        R.Regime("slope", K).update(16, float("nan"))


# --- state, and what a log keeps

def test_resuming_replays_the_probes_exactly():
    whole, *_ = run(two_phase)
    probes = list(zip(whole.k, whole.D))
    half, again = R.Regime("slope", K), R.Regime("slope", K)
    for k, D in probes[:40]:
        half.update(k, D)
    again.load_state_dict(half.state_dict())
    for k, D in probes[40:]:
        again.update(k, D)
    assert torch.equal(again.losses, whole.losses)
    del again.losses, whole.losses  # tensors, which == would compare value by value
    assert vars(again) == vars(whole)


def test_the_log_keeps_the_slope_of_each_probe_and_that_there_is_no_signal():
    falls, *_ = run(two_phase)
    assert falls.notes(K) == {"slope": falls.s} and falls.notes(K - 1) == {}, "a slope belongs to its probe"
    does_not, *_ = run(flat)
    assert does_not.notes(K) == {"no_signal": 1, "slope": does_not.s}
    assert does_not.notes(K - 1) == {"no_signal": 1}
    young = R.Regime("slope", K)
    young.update(16, 1.0)
    assert young.notes(16) == {}, "one probe has no slope"


# --- its other sources

def test_the_clock_is_a_replay_of_k_over_K(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": k, "r": k / 100}) + "\n" for k in range(1, 101)))
    clock, replay = R.Regime("clock", 100), R.Regime(f"replay:{log}", 100)
    assert all(clock.r(k) == replay.r(k) for k in range(1, 101))
    assert not clock.measured and not replay.measured
    (tmp_path / "none.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="none.jsonl"):
        R.Regime(f"replay:{tmp_path / 'none.jsonl'}", 100)


def test_between_the_steps_of_a_log_the_last_value_holds():
    steps, values = np.array([4, 8]), np.array([0.25, 0.5])
    assert R.hold_last(steps, values, [1, 4, 7, 8, 99]).tolist() == [0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("source", ["sun", "replay", "replay:", "clock:x"])
def test_unknown_sources_are_refused(source):
    with pytest.raises(ValueError, match="slope, loss, clock or replay:FILE"):
        R.Regime(source, 100)


def test_the_loss_source_takes_the_mean_since_the_last_probe_and_resumes():
    first, resumed = R.Regime("loss", K), R.Regime("loss", K)
    for loss in (1.0, 2.0):
        first.observe(torch.tensor(loss))
    resumed.load_state_dict(first.state_dict())
    for regime in (first, resumed):
        regime.observe(torch.tensor(6.0))
        assert regime.mean_loss() == 3.0
        regime.observe(torch.tensor(5.0))
        assert regime.mean_loss() == 5.0, "what was averaged is forgotten"
        assert regime.measured


# --- the discrepancy

def test_signals_are_made_of_what_they_need():
    """t1: D at t = 1; levels: mean of the others; ratio: over D under shuffled conditions; the latent proxy
    is t1 of other features."""
    D = {1.0: 0.8, 0.9: 0.5, 0.7: 0.3, 0.5: 0.1}
    assert R.signal("t1", D) == R.signal("latent", D) == 0.8
    assert abs(R.signal("levels", D) - 0.3) < 1e-12 and R.signal("ratio", D, 0.96) == 0.8 / 0.96
    for kind in R.SIGNALS:
        levels, shuffled = R.levels_of(kind)
        R.signal(kind, {t: 1.0 for t in levels}, 1.0 if shuffled else None)


def cosine(x, y) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def test_discrepancy_is_the_slow_double_loop_and_centring_matters():
    a, b, mean = torch.randn(3, 5, 7) + 10, torch.randn(3, 5, 7) + 10, torch.full((7,), 10.0)
    slow = [np.mean([1 - cosine(a[i, j] - mean, b[i, j] - mean) for j in range(5)]) for i in range(3)]
    assert np.allclose(R.discrepancy(a, b, mean), slow, atol=1e-5)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 3)
    assert torch.allclose(R.discrepancy(a, b, mean, mask), R.discrepancy(a[:, :3], b[:, :3], mean))
    uncentred, centred = R.discrepancy(a, b), R.discrepancy(a, b, mean)
    assert uncentred.max() < 0.05 < centred.min(), "uncentred features are alike, whatever they hold"


def identity(x):
    return x


def test_a_perfect_prediction_has_no_discrepancy_at_any_level():
    """v = eps - x0 exactly: x0_hat = x0. Negative control: the flipped sign is far off."""
    x0, eps = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    perfect = R.probe(lambda x, t: eps - x0, identity, x0, eps, R.LEVELS)
    flipped = R.probe(lambda x, t: x0 - eps, identity, x0, eps, R.LEVELS, target=x0)
    assert list(perfect) == [1.0, 0.9, 0.7, 0.5] and max(map(abs, perfect.values())) < 1e-4
    assert min(flipped.values()) > 0.05
