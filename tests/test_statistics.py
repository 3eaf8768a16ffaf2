"""Claims about the statistics, calibrated on simulated arms."""
import itertools

import numpy as np
import pytest
import scipy.stats

from lab import statistics as S


@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_of_a_known_difference_covers_it_and_no_difference_is_rarely_rejected(n):
    """2,000 simulated experiments: seeds share a strong common effect (their data), which pairing must
    cancel."""
    rng = np.random.default_rng(n)
    covered, rejected = [], []
    for _ in range(2_000):
        common = 0.1 * rng.standard_normal(n)
        a = 0.5 + common + 0.02 * rng.standard_normal(n)
        b = 0.5 + common + 0.02 * rng.standard_normal(n)
        _, low, high = S.interval(a + 0.03 - b)
        covered.append(low <= 0.03 <= high)
        rejected.append(S.sign_flip(a - b)[0] <= 0.05)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(rejected) <= 0.06


def test_negative_control_unpaired_intervals_miss_small_differences():
    """How often does an interval leave out 0, in 200 experiments of 8 seeds that have it in common?"""
    rng, told = np.random.default_rng(0), []
    for _ in range(200):
        common = 0.1 * rng.standard_normal(8)
        a = 0.53 + common + 0.02 * rng.standard_normal(8)
        b = 0.5 + common + 0.02 * rng.standard_normal(8)
        told.append([S.interval(difference)[1] > 0 for difference in (a - b, a - rng.permutation(b))])
    paired, unpaired = np.mean(told, 0)
    assert paired > 0.6 and unpaired < 0.2


def test_an_interval_as_text():
    assert S.format_interval([-0.1, 0.25]) == "[-0.100, +0.250]"
    assert S.format_interval([0.1, 0.25], sign=False, digits=2) == "[0.10, 0.25]"
    assert S.format_interval([float("nan")] * 2) == "-"


def test_sign_flip_is_the_slow_enumeration_and_states_its_smallest_p():
    d = np.random.default_rng(1).standard_normal(6) + 0.5
    all_signs = itertools.product((1, -1), repeat=6)
    as_large = [abs(sum(s * x for s, x in zip(signs, d))) >= abs(d.sum()) - 1e-12 for signs in all_signs]
    assert S.sign_flip(d) == (np.mean(as_large), 2 / 64)
    assert S.sign_flip(np.ones(5)) == (2 / 32, 2 / 32)
    assert S.sign_flip(np.zeros(4))[0] == 1.0
    many, drawn = S.sign_flip(np.ones(20))                     # drawn, not enumerated: with the observed one
    assert many >= 1 / (S.MANY + 1) and drawn == S.smallest_p(20) == 1 / S.MANY
    exact = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert abs(S.sign_flip(d)[0] - exact.pvalue) < 1e-9


def test_differences_that_sum_to_zero_have_p_one_whatever_the_rounding():
    assert S.sign_flip([0.03, -0.01, 0.02, -0.04, 0.01, 0.01, -0.03, 0.01])[0] == 1.0


def test_holm_is_the_textbook_example():
    assert np.allclose(S.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert S.holm([0.9, 0.8]) == [1.0, 1.0]


# --- time to quality

def test_the_passage_of_a_quality_is_where_the_fit_has_it():
    """Also behind a plateau: the fit is flat to its end. Of a plateau's own height it is its start."""
    assert np.allclose(np.exp(S.passage([1, 2, 4, 8, 16], [0, 0.5, 0.5, 0.5, 1], [0, 0.25, 0.5, 0.75, 1])),
                       [1, 2**0.5, 2, 8 * 2**0.5, 16])
    rng = np.random.default_rng(3)
    for _ in range(20):
        x, y = np.geomspace(50, 1_200, 12), rng.standard_normal(12).cumsum()
        fit = S.isotonic(y)
        q = rng.uniform(fit[0], fit[-1], 30)
        assert np.allclose(np.interp(S.passage(x, y, q), np.log(x), fit), q)


def test_an_arm_with_noisier_curves_is_not_sooner_than_itself():
    rng = np.random.default_rng(1)
    logs = []
    for _ in range(300):
        ref, arm = noisy(rng, n=14, sd=0.01), noisy(rng, n=14, sd=0.06)
        logs.append(S.time_to_quality(*ref, *arm)[0])
    assert abs(np.mean(logs)) < 0.03, "1.08 where passages are taken from a plateau's start"


def noisy(rng, scale=1.0, n=24, sd=0.03):
    """A learning curve that needs `scale` times fewer steps: quality 1 - exp(-scale k / 400) at n
    evaluations, with noise."""
    k = np.linspace(50, 1_200, n)
    return k, 0.8 * (1 - np.exp(-scale * k / 400)) + sd * rng.standard_normal(n)


def test_an_arm_with_noisy_curves_is_not_sooner_than_itself_and_a_planted_factor_is_found():
    """100 experiments of 8 seeds. Negative control: first passages against the noise-free curve make an arm
    'faster' than itself."""
    rng = np.random.default_rng(0)
    inside, found, naive = [], [], []
    for _ in range(100):
        ref, same, twice = ([noisy(rng, scale) for _ in range(8)] for scale in (1, 1, 2))
        low, high = S.speed_up(ref, same)["interval"]
        inside.append(low <= 1 <= high)
        found.append(S.speed_up(ref, twice)["ratio"])
        k, y = noisy(rng, n=240, sd=0.05)
        truth = 0.8 * (1 - np.exp(-k / 400))
        q = np.linspace(0.2, 0.7, 20)
        first_passage = [k[np.argmax(y >= value)] for value in q]
        naive.append(np.mean(np.log(np.interp(q, truth, k) / first_passage)))
    assert np.mean(inside) >= 0.9
    assert 1.7 < np.exp(np.mean(np.log(found))) < 2.3
    assert np.exp(np.mean(naive)) > 1.05


def test_swapping_two_arms_inverts_the_result_and_an_arm_against_itself_is_exactly_one():
    rng = np.random.default_rng(3)
    a = [noisy(rng) for _ in range(4)]
    b = [noisy(rng, 1.5) for _ in range(4)]
    there, back, same = S.speed_up(a, b), S.speed_up(b, a), S.speed_up(a, a)
    assert abs(there["ratio"] * back["ratio"] - 1) < 1e-9
    assert abs(there["interval"][0] * back["interval"][1] - 1) < 1e-9
    assert same["ratio"] == 1.0 and same["interval"] == [1.0, 1.0]
    there, back = S.paired([1, 2, 3], [0, 2.5, 1]), S.paired([0, 2.5, 1], [1, 2, 3])
    assert there["difference"] == -back["difference"] and there["p"] == back["p"]
    zero = S.paired([1, 2, 3], [1, 2, 3])
    assert zero["difference"] == 0 and zero["interval"] == [0, 0] and zero["p"] == 1


def test_the_time_to_the_references_end_counts_the_seeds_that_never_reach_it():
    """Arms twice as fast, and half as fast, without noise; one seed of each as fast as the reference."""
    rng = np.random.default_rng(0)
    ref = [noisy(rng, sd=0.0)] * 5
    fast = S.speed_up(ref, [noisy(rng, 2, sd=0.0)] * 4 + ref[:1])
    slow = S.speed_up(ref, [noisy(rng, 0.5, sd=0.0)] * 4 + ref[:1])
    assert abs(fast["at_end"] - 2) < 0.03 and fast["reach_end"] == 5
    assert slow["at_end"] is None and slow["reach_end"] == 1
    even = S.speed_up(ref[:4], [noisy(rng, scale, sd=0.0) for scale in (1.5, 1.5, 2.5, 2.5)])
    assert abs(even["at_end"] - 2) < 0.05, "between the middle two, not the lower of them"
    assert S.time_to_end(*ref[0], *ref[0]) == 1.0


def test_a_quality_that_an_arm_never_reaches_is_censored_not_invented():
    k = np.arange(1.0, 11)
    low, high = 0.02 * k, 0.02 * k + 0.5
    assert np.isnan(S.time_to_quality(k, low, k, high)[0])
    assert S.speed_up([(k, low)], [(k, high)])["n"] == 0
    found = S.speed_up([(k, low)] * 2, [(k, high), (k, low)])
    assert (found["n"], found["of"], found["shared"]) == (1, 2, 1.0), "the share is of those that share any"
    log_ratio, shared = S.time_to_quality(k, 0.1 * k, k, 0.05 * k)
    assert log_ratio < 0
    assert 0.4 < shared < 0.5, "only half of the reference's range is compared"


def test_isotonic_fits_are_monotone_and_leave_monotone_curves_alone():
    y = np.random.default_rng(0).standard_normal(30).cumsum()
    assert (np.diff(S.isotonic(y)) >= -1e-12).all()
    assert np.allclose(S.isotonic(np.sort(y)), np.sort(y))


# --- does one curve follow another?

def simulated_runs(rng, tie: float, n=10, m=12):
    """Runs whose quality follows D's fall with strength `tie`; all share the same trends."""
    x = np.linspace(5, 11, m)
    runs = []
    for _ in range(n):
        own = rng.standard_normal(m).cumsum() * 0.02
        quality = 0.1 * (x - 5) + tie * own + 0.01 * rng.standard_normal(m).cumsum()
        runs.append({"x": x, "D": 1 - 0.08 * (x - 5) - own, "quality": quality})
    return runs


def test_the_rate_correlation_sees_a_tie_and_not_two_common_trends():
    """D and quality always both move with training; only runs that are ahead in both at the same step count.
    Negative control: the plain correlation of the two curves is near -1 with no tie at all."""
    rng = np.random.default_rng(0)
    tied = [S.rate_correlation(simulated_runs(rng, 1.0)) for _ in range(5)]
    assert all(t["correlation"] > 0.5 and t["interval"][0] > 0 and t["p"] < 0.05 for t in tied)
    free = [S.rate_correlation(simulated_runs(rng, 0.0)) for _ in range(16)]
    assert np.mean([f["p"] <= 0.05 for f in free]) <= 0.125
    run = simulated_runs(rng, 0.0, n=1)[0]
    assert np.corrcoef(run["D"], run["quality"])[0, 1] < -0.8

    # A trend whose rate changes, the same in all runs, is none of any run's own; an opposite tie is seen too.
    def waved(tie):
        wave = 0.2 * np.sin(np.linspace(10, 22, 12))
        runs = simulated_runs(rng, tie)
        return [{**run, "D": run["D"] - wave, "quality": run["quality"] + wave} for run in runs]

    assert np.mean([S.rate_correlation(waved(0.0))["p"] <= 0.05 for _ in range(16)]) <= 0.125
    opposite = S.rate_correlation(waved(-1.0))
    assert opposite["correlation"] < -0.5 and opposite["p"] < 0.05


def test_the_interval_of_a_rate_correlation_holds_the_true_one_in_some_95_of_100(monkeypatch):
    """Of ten runs with tie 0.5; the true correlation by 4,000 runs."""
    monkeypatch.setattr(S, "_orders", lambda n: [np.arange(n)])    # p is not asked here, and takes long
    rng = np.random.default_rng(1)
    many = simulated_runs(np.random.default_rng(9), 0.5, n=4_000)
    true = S._correlation_at_same_step(-S._rates(many, "D"), S._rates(many, "quality"))
    intervals = [S.rate_correlation(simulated_runs(rng, 0.5))["interval"] for _ in range(150)]
    held = np.mean([low <= true <= high for low, high in intervals])
    assert 0.2 < true < 0.9 and 0.88 <= held <= 0.99


def test_a_quality_that_never_changes_has_no_correlation_and_no_p_of_zero():
    rng = np.random.default_rng(0)
    runs = [{"x": np.arange(5.0), "D": rng.standard_normal(5), "quality": np.zeros(5)} for _ in range(4)]
    with np.errstate(invalid="ignore"):
        found = S.rate_correlation(runs)
    assert np.isnan(found["correlation"]) and found["p"] == 1.0
