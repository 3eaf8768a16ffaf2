"""Claims about the regime variable."""
import json

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT

import guidance
import regime as R
from parts import config

K = 8_192


def run(curve, noise=0.005, seed=0) -> tuple[R.Regime, np.ndarray, np.ndarray]:
    """Feed a discrepancy curve -> (regime, probe steps, r at each)."""
    rng, regime = np.random.default_rng(seed), R.Regime("slope", K)
    steps, found = np.array(R.probe_steps(K)), []
    for k in steps:
        regime.update(k, curve(k) + noise * rng.standard_normal())
        found.append(regime.r(k))
    return regime, steps, np.array(found)


# --- curves with a known answer, straight in k^(1/3), the axis of the slope

def root(k):
    return k ** (1 / 3)


def two_phase(k):
    return 1 - 0.08 * root(min(k, 512))


def exponential(k):
    return 0.3 + 0.7 * np.exp(-k / 300)


def falling_for_ever(k):
    return 2 - 0.05 * root(k)


def straight_in_log_k(k):
    return 1 - 0.05 * np.log2(k)


def flat(k):
    return 0.8


def rising(k):
    return 0.5 + 0.02 * root(k)


# --- the slope

def test_probes_are_four_a_doubling_from_32_to_the_end():
    """k_j = round(32 * 2^(j/4)) for all j that fit, whether or not K is one of them."""
    steps = R.probe_steps(K)
    assert steps == [round(32 * 2 ** (j / 4)) for j in range(33)] and steps[-1] == K
    assert R.probe_steps(31) == [] and R.probe_steps(32) == [32]
    for short in (63, 64, 1_000):
        assert R.probe_steps(short) == [k for k in steps if k <= short]
    clock = R.Regime("clock", K)
    assert [clock.probe_index(k) for k in (32, 64, 65, 128)] == [0, 4, None, 8]


def test_slope_and_its_error_are_scipys_and_those_of_the_normal_equations():
    """Slope and error by scipy, by numpy's polynomial fit, and written out: s^2 (X^T X)^-1."""
    n = R.WINDOW
    k, D = np.array(R.probe_steps(K))[:n], np.random.default_rng(0).standard_normal(n)
    fit = scipy.stats.linregress(root(k), D)
    (slope, _), covariance = np.polyfit(root(k), D, 1, cov=True)
    X = np.stack([root(k), np.ones(n)], 1)
    inverse = np.linalg.inv(X.T @ X)
    by_hand = inverse @ X.T @ D
    variance = ((D - X @ by_hand) ** 2).sum() / (n - 2)
    for s, error in ((-fit.slope, fit.stderr), (-slope, covariance[0, 0] ** 0.5),
                     (-by_hand[0], (variance * inverse[0, 0]) ** 0.5)):
        assert np.allclose(R.slope(k, D), (s, error))
    assert R.slope(k, 1 - 0.25 * root(k))[0] == pytest.approx(0.25), "positive when D falls"


@pytest.mark.parametrize("share, counts", [(0.9, False), (1.1, True)])
def test_a_fall_counts_from_a_share_of_the_first_windows_mean_on(share, counts):
    """Without noise: D falls by nine or by eleven tenths of the least fall over its first window."""
    k = np.array(R.probe_steps(K)[: R.WINDOW])
    x, regime = root(k), R.Regime("slope", K)
    for each, D in zip(k, 3 - 3 * share * R.MIN_RELATIVE * (x - x.mean()) / (x[-1] - x[0])):
        regime.update(each, D)
    assert (regime.ref is not None) == counts


# --- r follows it

CURVES = [two_phase, exponential, falling_for_ever, straight_in_log_k, flat, rising]


@pytest.mark.parametrize("curve", CURVES)
def test_r_stays_in_the_unit_interval_and_ignores_the_scale_of_D(curve):
    _, _, r = run(curve)
    _, _, again = run(lambda k: 4 * curve(k), noise=0.02)
    assert ((0 <= r) & (r <= 1)).all() and np.allclose(r, again, atol=1e-9)


def test_where_progress_is_straight_in_the_cube_root_r_stays_low():
    assert run(falling_for_ever, noise=0)[2].max() < 1e-6
    assert max(run(falling_for_ever, seed=seed)[2].max() for seed in range(20)) < 0.4, "with noise"


@pytest.mark.parametrize("power, least, most", [(1 / 3, 0.4, 0.6), (1, 0.8, 1), (1e-3, 0, 0.02)])
def test_on_a_curve_that_is_straight_in_log_k_r_follows_the_closed_form(monkeypatch, power, least, most):
    """Each window is the first one, stretched: the slope on k^p falls by 2^(-p/4) a probe. Negative
    controls: before a tenth of the run r is near 1 on the axis k, and 0 on one that is nearly log k."""
    monkeypatch.setattr(R, "POWER", power)
    _, steps, r = run(straight_in_log_k, noise=0)
    rho, mean = 2.0 ** (-power / R.PER_DOUBLING * np.arange(len(steps) - R.WINDOW + 1)), 1.0
    for each, found in zip(rho, r[R.WINDOW - 1 :]):
        mean = (1 - R.NEWEST_SHARE) * mean + R.NEWEST_SHARE * each
        assert abs(found - (1 - mean)) < 0.03  # the steps of probes are rounded
    assert least <= r[steps == 724][0] <= most


def found_in_time(curve, seeds=100, doublings=0.75) -> float:
    """Share of seeds whose r passes 0.5 within so many doublings of the switch at step 512."""
    crossed = []
    for seed in range(seeds):
        _, steps, r = run(curve, seed=seed)
        late = np.flatnonzero((r > 0.5) & (steps > 64))
        crossed.append(np.log2(steps[late[0]] / 512) if len(late) else np.inf)
    return np.mean(np.abs(crossed) <= doublings)


@pytest.mark.parametrize("after, doublings", [(0.0, 0.75), (0.01, 1.0)])
def test_a_planted_switch_is_found_within_a_doubling(after, doublings):
    """D falls at a rate of 0.08 until step 512, and of 0 or 0.01 from there."""
    def curve(k):
        return two_phase(k) - after * (root(max(k, 512)) - root(512))

    assert found_in_time(curve, doublings=doublings) >= 0.95
    assert run(curve)[2][-1] > 0.7


@pytest.mark.parametrize("name, longer", [("WINDOW", 2 * R.PER_DOUBLING + 1), ("NEWEST_SHARE", 0.2)])
def test_negative_control_a_longer_memory_finds_the_switch_too_late(monkeypatch, name, longer):
    monkeypatch.setattr(R, name, longer)
    assert found_in_time(two_phase, 20) == 0


def plateau(k):
    """Falls until step 512, stands still for a doubling, and falls on at the same rate."""
    return 1 - 0.08 * (root(min(k, 512)) + max(0, root(k) - root(1_024)))


def share_that_end_guidance(curve, seeds=100) -> float:
    """Share of seeds whose r passes the point from which guidance is not computed any more."""
    highest = [r[steps > 64].max() for _, steps, r in (run(curve, seed=seed) for seed in range(seeds))]
    return np.mean(np.array(highest) > guidance.OFF_AT)


def test_a_plateau_of_a_doubling_does_not_end_guidance_and_a_real_end_does():
    """Guidance has no way back: what ends it must be no pause."""
    assert share_that_end_guidance(plateau) <= 0.05
    assert share_that_end_guidance(two_phase) >= 0.95


def test_negative_control_without_memory_a_plateau_ends_guidance(monkeypatch):
    monkeypatch.setattr(R, "WINDOW", 3)
    monkeypatch.setattr(R, "NEWEST_SHARE", 1.0)
    assert share_that_end_guidance(plateau, 20) >= 0.5


@pytest.mark.parametrize("curve", [flat, rising])
def test_flat_and_rising_curves_give_no_signal_and_the_clock(curve):
    results = [run(curve, seed=seed) for seed in range(100)]
    assert np.mean([regime.no_signal for regime, _, _ in results]) >= 0.95
    regime, steps, r = next(result for result in results if result[0].no_signal)
    regime.K = 2 * K
    assert regime.r(regime.k[-1] + 100) == regime.k[-1] / (2 * K), "that of the last probe, until the next"
    late = steps >= 0.15 * K
    assert r[-1] == 1.0 and np.allclose(r[late], steps[late] / K)
    assert (~late).sum() > R.WINDOW and (r[~late] == 0).all(), "not before 15 % of the run"


def test_negative_control_without_significance_noise_would_be_a_signal(monkeypatch):
    monkeypatch.setattr(R, "MIN_STANDARD_ERRORS", 0.0)
    monkeypatch.setattr(R, "MIN_RELATIVE", 0.0)
    assert not any(run(flat, seed=seed)[0].no_signal for seed in range(10))


@pytest.mark.parametrize("source", ["slope", "loss", "agreement"])
def test_a_run_that_is_too_short_for_a_slope_is_not_said_to_have_no_signal(source):
    """Of 80 steps 15 % are 12, and the first window ends at step 76: r is 0 until then."""
    short = R.Regime(source, 80)
    for k in R.probe_steps(80)[: R.WINDOW - 1]:
        if source != "agreement" or k < 45:
            short.update(k, 0.8)
        assert short.r(k) == 0 and not short.no_signal


def test_negative_control_a_slope_of_the_wrong_sign_finds_no_fall(monkeypatch):
    right = R.slope

    def wrong_sign(k, D):
        s, standard_error = right(k, D)
        return -s, standard_error

    monkeypatch.setattr(R, "slope", wrong_sign)
    assert run(two_phase)[0].no_signal


def test_values_that_are_not_finite_are_refused():
    for source in ("slope", "agreement"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="step 32"):
                R.Regime(source, K).update(32, value)


def test_a_steeper_slope_that_does_not_count_keeps_r_at_0_and_not_below():
    """D falls in a line and once by 2: a slope of many times ref, but within four standard errors."""
    regime, _, r = run(lambda k: 1 - 0.02 * root(k) - 2 * (k >= 1_024), noise=0)
    assert regime.ref == pytest.approx(0.02) and r.min() >= 0


def test_the_largest_slope_so_far_is_the_reference_and_not_the_first():
    """D falls at a quarter of its later rate until step 256 and from 2,048: at the end r is near 3 / 4."""
    def curve(k):
        return 3 - 0.02 * root(k) - 0.06 * (root(min(max(k, 256), 2_048)) - root(256))
    regime = R.Regime("slope", K)
    for k in R.probe_steps(K):
        regime.update(k, curve(k))
    assert regime.ref == pytest.approx(0.08) and 0.7 < regime.r(K) < 0.75


@pytest.mark.parametrize("errors, counts", [(3.9, False), (4.1, True)])
def test_a_slope_counts_from_four_standard_errors_on(errors, counts):
    """A line and scatter at right angles to it: the line alone makes the slope, the scatter the error."""
    k = np.array(R.probe_steps(K)[: R.WINDOW])
    x, scatter = root(k), 0.1 * np.random.default_rng(0).standard_normal(R.WINDOW)
    scatter -= np.polyval(np.polyfit(x, scatter, 1), x)
    regime = R.Regime("slope", K)
    for each, D in zip(k, 1 + scatter - errors * R.slope(k, scatter)[1] * x):
        regime.update(each, D)
    assert (regime.ref is not None) == counts


# --- state, and what a log keeps

def resumed(whole: R.Regime, after: int) -> R.Regime:
    """A regime that was stopped after some probes of `whole`, saved, loaded, and given the rest."""
    half, again = R.Regime(whole.source, K), R.Regime(whole.source, K)
    for k, D in zip(whole.k[:after], whole.D[:after]):
        half.update(k, D)
    again.load_state_dict(half.state_dict())
    for k, D in zip(whole.k[after:], whole.D[after:]):
        again.update(k, D)
    return again


def same(a: R.Regime, b: R.Regime) -> bool:
    """Equal in every attribute, bit by bit."""
    without = [{name: x for name, x in vars(regime).items() if name != "losses"} for regime in (a, b)]
    return without[0] == without[1] and torch.equal(a.losses, b.losses)


@pytest.mark.parametrize("after", [0, 2, 4, 5, 20, 33])
def test_resuming_replays_the_probes_exactly(after):
    whole, *_ = run(two_phase)
    assert same(resumed(whole, after), whole)
    assert not same(run(two_phase, seed=1)[0], whole), "negative control: other probes, another state"


def test_the_log_keeps_the_slope_of_each_probe_and_that_there_is_no_signal():
    falls, *_ = run(two_phase)
    assert falls.notes(K) == {"slope": falls.s}
    assert falls.notes(K - 1) == {}, "a slope belongs to its probe"
    does_not, *_ = run(flat)
    assert does_not.notes(K) == {"no_signal": 1, "slope": does_not.s}
    assert does_not.notes(K - 1) == {"no_signal": 1}
    young = R.Regime("slope", K)
    for k in R.probe_steps(K)[: R.WINDOW - 1]:
        young.update(k, 1.0)
        assert young.notes(k) == {}, "too few probes for a slope"


def test_the_clock_is_followed_only_until_there_is_a_fall():
    """Flat until a quarter of the run, then falling as steeply as ever: r goes back to 0."""
    regime, steps, r = run(lambda k: 2 - 0.08 * (root(max(k, 2_048)) - root(2_048)), noise=0.002)
    assert r[list(steps).index(1_448)] == pytest.approx(1_448 / K) and not regime.no_signal
    assert r[-1] < 0.15


@pytest.mark.parametrize("at_first, counts", [(1.0, False), (0.1, True)])
def test_what_a_fall_must_be_is_told_by_the_first_window_and_not_by_the_last(at_first, counts):
    """Late in the run D falls by 0.01 a window: a tenth of what is left, a hundredth of what it was at first
    in one case. (The jump between is no straight line, and so no slope that counts.)"""
    regime, *_ = run(lambda k: at_first if k < 1_024 else 0.1 - 0.002 * (root(k) - root(1_024)), noise=0)
    assert (regime.ref is not None) == counts


@pytest.mark.parametrize("task, steps", [("sr", 3_000), ("t2a", 6_000)])
def test_the_recorded_runs_have_the_r_the_slope_and_the_lambda_of_their_own_discrepancies(task, steps):
    """Of default runs (results/): all that r is made of is what it was when they were recorded."""
    regime = R.Regime("slope", steps)
    log = ROOT / f"results/regime-{task}.jsonl"
    for row in map(json.loads, log.read_text().splitlines()):
        regime.update(row["step"], row["D"])
        assert row["D"] == pytest.approx(np.mean([row["D_of"][name] for name in R.LEVELS]))
        assert regime.r(row["step"]) == pytest.approx(row["r"], abs=1e-9)
        assert regime.notes(row["step"]) == pytest.approx({"slope": row["slope"]} if "slope" in row else {})
        assert guidance.ssl_weight(row["r"], 0.5) == pytest.approx(row["lambda"])
    assert row["r"] > 0.9 and row["step"] == R.probe_steps(steps)[-1]


# --- its other sources

def test_the_clock_is_a_replay_of_k_over_K(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": k, "r": k / 100}) + "\n" for k in range(1, 101)))
    clock, replay = R.Regime("clock", 100), R.Regime(f"replay:{log}", 100)
    assert all(clock.r(k) == replay.r(k) for k in range(1, 101))
    assert not clock.no_signal and not replay.no_signal
    assert clock.r(101) == 1.0
    with log.open("a") as f:
        f.write('{"step": 100, "r": 0.')
    assert R.Regime(f"replay:{log}", 100).r(100) == 1.0, "of a killed run, whose last line was cut off"


NO_LOG = "lines that are none of a run's log"


@pytest.mark.parametrize("line, why", [
    ({"step": 1}, "no value of r"), ({"step": 1, "r": 1.5}, "outside"), ({"r": 0.5}, NO_LOG), (5, NO_LOG),
    ({"step": 1, "r": None}, NO_LOG), ({"step": 1, "r": "x"}, NO_LOG)])
def test_a_replayed_file_without_r_or_with_an_impossible_one_is_refused_by_name(tmp_path, line, why):
    (tmp_path / "none.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=f"none.jsonl: .*{why}"):
        R.Regime(f"replay:{tmp_path / 'none.jsonl'}", 100)


def test_between_the_steps_of_a_log_the_last_value_holds():
    steps, values = np.array([4, 8]), np.array([0.25, 0.5])
    assert R.hold_last(steps, values, [1, 4, 7, 8, 99]).tolist() == [0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("source", ["sun", "replay", "replay:", "clock:x", "agreement:x", "slope:"])
def test_unknown_sources_are_refused(source):
    with pytest.raises(ValueError, match="slope, loss, agreement, clock or replay:FILE"):
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
        assert np.isnan(regime.mean_loss()), "of no loss"


def test_neither_a_probe_nor_an_observed_loss_keeps_a_graph():
    regime, weight, seen = R.Regime("loss", K), torch.ones((), requires_grad=True), []
    regime.observe(2 * weight)
    R.probe(lambda x, t: seen.append(torch.is_grad_enabled()) or weight * x, torch.nn.Identity(),
            *torch.randn(2, 3, 4, 5), R.PREDICTIONS)
    assert not regime.losses.requires_grad and not any(seen)


def agreement(cosines) -> tuple[R.Regime, list[float]]:
    """A regime given these cosines at every second probe step -> (regime, r after each)."""
    regime, found = R.Regime("agreement", K), []
    for k, cosine in zip(R.probe_steps(K)[::2], cosines):
        regime.update(k, cosine)
        found.append(regime.r(k))
    return regime, found


def test_fewer_than_three_cosines_say_nothing():
    for cosines in ([0.5], [0.5, -0.5], [-1.0, -1.0]):
        assert agreement(cosines)[1] == [0.0] * len(cosines)
    assert R.Regime("agreement", K).r(1) == 0


def test_guidance_that_agrees_as_much_as_ever_keeps_r_at_0():
    regime, r = agreement([0.3] * 12)
    assert max(r) < 1e-12 and not regime.no_signal
    assert max(agreement([0.1 * j for j in range(1, 10)])[1]) < 1e-12, "and so does one that agrees more"


@pytest.mark.parametrize("cosine", [0.0, -0.5])
def test_gradients_orthogonal_or_opposed_from_the_start_are_the_end_of_guidance(cosine):
    regime, r = agreement([cosine] * 6)
    assert r == [0, 0, 1, 1, 1, 1] and not regime.no_signal


def test_agreement_that_falls_in_a_line_follows_the_closed_form():
    """Cosines c_j = c - a j: their moving average lags by a (1 - p) / p (1 - (1 - p)^j), p the share of
    the newest; r = 1 - average / its value at the third cosine, the largest that counts; 1 once it is
    below 0."""
    p, c, a, j = R.NEWEST_SHARE, 0.6, 0.08, np.arange(12)
    average = c - a * j + a * (1 - p) / p * (1 - (1 - p) ** j)
    expected = np.where(j < 2, 0, np.clip(1 - average / average[2], 0, 1))
    regime, r = agreement(c - a * j)
    assert np.allclose(r, expected, atol=1e-12) and r == sorted(r) and r[-1] == 1
    raw = 1 - np.clip((c - a * j) / (c - 2 * a), 0, 1)
    assert not np.allclose(r[3:], raw[3:], atol=0.01), "negative control: without the average"
    assert all(same(resumed(regime, after), regime) for after in (0, 1, 2, 3, 7, 12))


def test_r_of_agreement_takes_no_slope_and_no_loss():
    """Neutral: the scale of the cosines does not matter, and observed losses change nothing."""
    regime, r = agreement([0.4, 0.5, 0.3, 0.2, 0.25, 0.1])
    assert np.allclose(agreement([0.04, 0.05, 0.03, 0.02, 0.025, 0.01])[1], r, atol=1e-12)
    assert regime.s is None and regime.notes(R.probe_steps(K)[10]) == {}
    regime.observe(torch.tensor(5.0))
    assert regime.r(K) == r[-1]


# --- the discrepancy

def test_every_signal_is_the_mean_of_what_it_needs():
    names = [name + how for name in R.PREDICTIONS for how in ("", "-pooled")]
    D = dict(zip(names, np.random.default_rng(0).random(len(names)).tolist()))
    assert R.signal("levels", D) == pytest.approx((D["t0.9"] + D["t0.7"] + D["t0.5"]) / 3)
    assert R.signal("latent", D) == R.signal("levels", D), "other features, the same prediction"
    assert R.signal("levels-pooled", D) == pytest.approx(
        (D["t0.9-pooled"] + D["t0.7-pooled"] + D["t0.5-pooled"]) / 3)
    for name in D:
        assert R.signal(name, D) == pytest.approx(D[name])
    batch = dict(zip(("x0", "eps"), torch.randn(2, 3, 4, 5)))
    for kind, needed in R.SIGNALS.items():
        probe = R.Probe(batch, torch.nn.Identity(), None, kind)
        found = probe(lambda x_t, t: 0.1 * x_t)
        predictions = {name.removesuffix("-pooled") for name in needed}
        assert set(found["D_of"]) == {name + how for name in predictions for how in ("", "-pooled")}
        assert found["D"] == R.signal(kind, found["D_of"])
        assert set(probe(lambda x_t, t: x_t, full=True)["D_of"]) == set(D)
    assert set(config.SIGNALS) == set(R.SIGNALS), "what may be typed is what there is"


def cosine(x, y) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def test_discrepancy_is_the_slow_double_loop_and_centring_matters():
    a, b, mean = torch.randn(3, 5, 7) + 10, torch.randn(3, 5, 7) + 10, torch.full((7,), 10.0)
    slow = [np.mean([1 - cosine(a[i, j] - mean, b[i, j] - mean) for j in range(5)]) for i in range(3)]
    assert np.allclose(R.discrepancy(a, b, mean), slow, atol=1e-5)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 3)
    assert torch.allclose(R.discrepancy(a, b, mean, mask), R.discrepancy(a[:, :3], b[:, :3], mean))
    for wrong in (a[:, 0], a[..., None]):
        with pytest.raises(ValueError, match="must be .B, T, F.; of one vector"):
            R.discrepancy(wrong, wrong)
    uncentred, centred = R.discrepancy(a, b), R.discrepancy(a, b, mean)
    assert uncentred.max() < 0.05 < centred.min(), "uncentred features are alike, whatever they hold"


def test_the_mean_over_tokens_counts_real_tokens_alone():
    x, mask = torch.randn(3, 5, 7), torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5])
    slow = torch.stack([x[0].mean(0), x[1, :2].mean(0), torch.zeros(7)])
    assert torch.allclose(R.over_tokens(x, mask), slow, atol=1e-6)
    assert torch.equal(R.over_tokens(x), x.mean(1)), "neutral: no mask"
    assert torch.allclose(R.over_tokens(x, torch.ones(3, 5, dtype=torch.bool)), x.mean(1), atol=1e-6)


def a_network(x, t):
    """Some velocity that depends on all it is given, each clip by itself."""
    return torch.tanh(1.3 * x + x.roll(1, -1)) * (0.5 + t[:, None, None]) + 0.2


def an_encoder(x):
    """Features (B, T, 5) of latents (B, T, 3)."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    return (x @ weight).sin() + 2


def by_hand(name: str, x0, eps):
    """The prediction `name`, written down again for one clip (T, C)."""
    def v(x, t):
        return a_network(x[None], torch.tensor([t]))[0]

    if name == "sample":
        x = eps
        x = x - 0.25 * v(x, 1.0)
        x = x - 0.25 * v(x, 0.75)
        x = x - 0.25 * v(x, 0.5)
        return x - 0.25 * v(x, 0.25)
    t = {"t1.0": 1.0, "t0.9": 0.9, "t0.7": 0.7, "t0.5": 0.5}[name]
    x_t = (1 - t) * x0 + t * eps
    return x_t - t * v(x_t, t)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 4, 1)])
def test_every_prediction_token_by_token_and_pooled_is_the_slow_loop_over_real_tokens(lengths):
    """Clip by clip and token by token; all tokens are real, or some are padding that holds garbage."""
    x0, eps, mean = torch.randn(3, 6, 3), torch.randn(3, 6, 3), torch.full((5,), 2.0)
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    found = R.probe(a_network, an_encoder, x0, eps, R.PREDICTIONS, mean, mask=mask)
    assert list(found) == [name + how for name in R.PREDICTIONS for how in ("", "-pooled")]
    for name in R.PREDICTIONS:
        frames, pooled = [], []
        for clip, n in enumerate(lengths):
            a = an_encoder(by_hand(name, x0[clip], eps[clip]))[:n] - mean
            b = an_encoder(x0[clip])[:n] - mean
            frames.append(np.mean([1 - cosine(a[j], b[j]) for j in range(n)]))
            pooled.append(1 - cosine(a.mean(0), b.mean(0)))
        assert abs(found[name] - np.mean(frames)) < 1e-5
        assert abs(found[f"{name}-pooled"] - np.mean(pooled)) < 1e-5
    unmasked = R.probe(a_network, an_encoder, x0, eps, R.PREDICTIONS, mean)
    if min(lengths) == 6:
        assert found == pytest.approx(unmasked, abs=1e-5), "neutral: all tokens are real"
    else:
        apart = [abs(unmasked[name] - found[name]) for name in found]
        assert np.median(apart) > 1e-3, "negative control (median: one may be near by chance)"


def test_pooled_and_token_wise_differ_where_tokens_are_in_another_order():
    """Pooled features say what is in a clip, not where: the same tokens backwards are the same clip."""
    x0, eps = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    D = R.probe(lambda x, t: eps - x0.flip(1), an_encoder, x0, eps, ("sample",), torch.full((5,), 2.0))
    assert abs(D["sample-pooled"]) < 1e-5 and D["sample"] > 0.2


def identity(x):
    return x


def test_a_sample_follows_the_exact_velocity_field_of_gaussian_data(monkeypatch):
    """x0 ~ N(0, s^2): v(x, t) = (t - (1 - t) s^2) x / ((1 - t)^2 s^2 + t^2) carries eps to s eps; four
    steps miss it, and two by more."""
    s, eps, apart = 0.4, torch.randn(2, 6, 3, dtype=torch.float64), {}

    def exact(x, t):
        t = t[:, None, None]
        return (t - (1 - t) * s**2) * x / ((1 - t) ** 2 * s**2 + t**2)

    for n in (2, 4, 4_000):
        monkeypatch.setattr(R, "SAMPLE_STEPS", n)
        sample = R.predicted("sample", exact, torch.full_like(eps, 9.0), eps)
        apart[n] = float((sample / (s * eps) - 1).abs().max())
    assert apart[4_000] < 1e-3 < apart[4] < apart[2], "and x0, which is 9 here, has no part in it"


def test_a_perfect_prediction_has_no_discrepancy_by_any_name():
    """v = eps - x0 exactly: x0_hat = x0. Negative control: the flipped sign is far off."""
    x0, eps = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    perfect = R.probe(lambda x, t: eps - x0, identity, x0, eps, R.PREDICTIONS)
    flipped = R.probe(lambda x, t: x0 - eps, identity, x0, eps, R.PREDICTIONS, target=x0)
    assert list(perfect) == list(flipped) and max(map(abs, perfect.values())) < 1e-4
    assert len(perfect) == 2 * len(R.PREDICTIONS) and min(flipped.values()) > 0.05


def test_a_sample_of_the_exact_field_of_single_sounds_is_the_sound():
    """v = (x - x0) / t carries any x to x0, in any number of steps."""
    x0, eps = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    D = R.probe(lambda x, t: (x - x0) / t[:, None, None], identity, x0, eps, ("sample",))
    assert max(map(abs, D.values())) < 1e-5


# --- why no signal is taken at t = 1

class World:
    """Sounds of eight classes: the amplitudes of eight partials are the class's, their phases random.

    Latents (n, 16) are real and imaginary parts; features are log powers, which know no phase."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.amplitude = torch.exp(0.5 * torch.randn(8, 8, generator=self.generator))
        self.mean = self.features(torch.cat([self.sounds(c, 64) for c in range(8)])).mean(0)

    def sounds(self, c: int, n: int):
        phase = 2 * np.pi * torch.rand(n, 8, generator=self.generator)
        return torch.cat([self.amplitude[c] * phase.cos(), self.amplitude[c] * phase.sin()], -1)

    @staticmethod
    def features(x):
        real, imaginary = x.chunk(2, -1)
        return torch.log(real**2 + imaginary**2 + 0.01)

    def discrepancy(self, believed) -> dict[str, float]:
        """D of the best network that holds the sounds believed(c) (n, 16) for possible, where the
        condition is class c: it predicts their mean, each as likely as x_t makes it."""
        found = []
        for c in range(8):
            possible, x0 = believed(c), self.sounds(c, 32)[:, None]

            def velocity(x, t, possible=possible):
                t = t[:, None, None]
                apart = (x - (1 - t) * possible).square().sum(-1)      # (B, n)
                x0_hat = torch.softmax(-apart / (2 * t[..., 0] ** 2), -1) @ possible
                return (x - x0_hat[:, None]) / t

            eps = torch.randn(x0.shape, generator=self.generator)
            names = ("t1.0", "t0.7", "sample")
            found.append(R.probe(velocity, self.features, x0, eps, names, self.mean))
        return {name: np.mean([D[name] for D in found]) for name in found[0]}


def test_at_t_1_a_better_mean_is_further_from_any_sound_and_at_less_noise_d_comes_to_rest():
    """The class is known; the mean of n of its sounds gets better with n, its features worse, without
    end. At t = .7 x_t tells the phases, up to a shortfall that 64 sounds show in full; a sample is a
    sound of the class throughout. Means over six worlds."""
    worlds, D = [World(seed) for seed in range(6)], {}
    for n in (1, 4, 16, 64, 1_024):
        found = [world.discrepancy(lambda c, world=world: world.sounds(c, n)) for world in worlds]
        D[n] = {name: np.mean([d[name] for d in found]) for name in found[0]}
    at_1 = [d["t1.0"] for d in D.values()]
    assert at_1 == sorted(at_1) and at_1[0] < 1e-5 and at_1[-1] > 0.9
    rise = {name: D[1_024][name] - D[64][name] for name in D[64]}
    assert rise["t1.0"] > 0.06 and rise["t1.0"] > 3 * rise["t0.7"]
    assert D[1_024]["t0.7"] < 0.65 and max(d["sample"] for d in D.values()) < 0.1


def test_while_classes_are_being_learnt_d_stands_still_at_t_1_and_falls_at_less_noise():
    """The network confuses 8, 4, 2 classes, then none. At t = 1 it predicts almost nothing all along."""
    world = World(1)

    def confusing(n):
        return lambda c: torch.cat([world.sounds((c + k) % 8, 512 // n) for k in range(n)])

    D = [world.discrepancy(confusing(n)) for n in (8, 4, 2, 1)]
    fall = {name: D[0][name] - D[-1][name] for name in D[0]}
    assert abs(fall["t1.0"]) < 0.1 and fall["t0.7"] > 0.2 and fall["sample"] > 0.7
    for name in ("t0.7", "sample"):
        values = [d[name] for d in D]
        assert values == sorted(values, reverse=True), "at every stage"
