"""Claims about the experiments: statistics on simulated arms, the runner, the user's own arms."""
import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

import data
import evaluate
import experiments as E
import regime
import train
from conftest import ROOT, in_process


# --- statistics, calibrated on simulated arms

@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_of_a_known_difference_covers_it_and_no_difference_is_rarely_rejected(n):
    """2,000 simulated experiments: seeds share a strong common effect (their data), which pairing must cancel."""
    rng = np.random.default_rng(n)
    covered, rejected = [], []
    for _ in range(2_000):
        common = 0.1 * rng.standard_normal(n)
        a, b = 0.5 + common + 0.02 * rng.standard_normal(n), 0.5 + common + 0.02 * rng.standard_normal(n)
        _, lo, hi = E.interval(a + 0.03 - b)
        covered.append(lo <= 0.03 <= hi)
        rejected.append(E.sign_flip(a - b)[0] <= 0.05)
    assert 0.93 <= np.mean(covered) <= 0.97 and np.mean(rejected) <= 0.06


def test_negative_control_unpaired_intervals_miss_small_differences():
    """The same simulation without pairing: intervals several times as wide."""
    rng = np.random.default_rng(0)
    common = 0.1 * rng.standard_normal(8)
    a, b = 0.53 + common + 0.02 * rng.standard_normal(8), 0.5 + common + 0.02 * rng.standard_normal(8)
    _, lo, hi = E.interval(a - b)
    _, lo2, hi2 = E.interval(a - rng.permutation(b))
    assert hi2 - lo2 > 2 * (hi - lo)


def test_sign_flip_is_the_slow_enumeration_and_states_its_smallest_p():
    d = np.random.default_rng(1).standard_normal(6) + 0.5
    slow = np.mean([abs(sum(s * x for s, x in zip(signs, d))) >= abs(d.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=6)])
    assert E.sign_flip(d) == (slow, 2 / 64) and E.sign_flip(np.ones(5)) == (2 / 32, 2 / 32) and E.sign_flip(np.zeros(4))[0] == 1.0
    exact = scipy.stats.permutation_test((d,), lambda x: x.mean(), permutation_type="samples", n_resamples=np.inf).pvalue
    assert abs(E.sign_flip(d)[0] - exact) < 1e-9


def test_holm_is_the_textbook_example():
    assert np.allclose(E.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]) and E.holm([0.9, 0.8]) == [1.0, 1.0]


def noisy(rng, scale=1.0, n=24, sd=0.03):
    """A learning curve that needs `scale` times fewer steps: quality 1 - exp(-scale k / 400) at n evaluations, with noise."""
    k = np.linspace(50, 1_200, n)
    return k, 0.8 * (1 - np.exp(-scale * k / 400)) + sd * rng.standard_normal(n)


def test_an_arm_with_noisy_curves_is_not_sooner_than_itself_and_a_planted_factor_is_found():
    """100 experiments of 8 seeds. Negative control: first passages against the noise-free curve make an arm 'faster' than itself."""
    rng, inside, found, naive = np.random.default_rng(0), [], [], []
    for _ in range(100):
        ref, same, twice = ([noisy(rng, s) for _ in range(8)] for s in (1, 1, 2))
        r = E.speed_up(ref, same)
        inside.append(r["interval"][0] <= 1 <= r["interval"][1])
        found.append(E.speed_up(ref, twice)["ratio"])
        k, y = noisy(rng, n=240, sd=0.05)
        truth, q = 0.8 * (1 - np.exp(-k / 400)), np.linspace(0.2, 0.7, 20)
        naive.append(np.mean(np.log(np.interp(q, truth, k) / [k[np.argmax(y >= v)] for v in q])))
    assert np.mean(inside) >= 0.9 and 1.7 < np.exp(np.mean(np.log(found))) < 2.3
    assert np.exp(np.mean(naive)) > 1.05


def test_swapping_two_arms_inverts_the_result_and_an_arm_against_itself_is_exactly_one():
    rng = np.random.default_rng(3)
    a, b = [noisy(rng) for _ in range(4)], [noisy(rng, 1.5) for _ in range(4)]
    x, y, same = E.speed_up(a, b), E.speed_up(b, a), E.speed_up(a, a)
    assert abs(x["ratio"] * y["ratio"] - 1) < 1e-9 and abs(x["interval"][0] * y["interval"][1] - 1) < 1e-9
    assert same["ratio"] == 1.0 and same["interval"] == [1.0, 1.0]
    d, e = E.paired([1, 2, 3], [0, 2.5, 1]), E.paired([0, 2.5, 1], [1, 2, 3])
    assert d["difference"] == -e["difference"] and d["p"] == e["p"]
    zero = E.paired([1, 2, 3], [1, 2, 3])
    assert zero["difference"] == 0 and zero["interval"] == [0, 0] and zero["p"] == 1


def test_a_quality_that_an_arm_never_reaches_is_censored_not_invented():
    k = np.arange(1.0, 11)
    low, high = 0.02 * k, 0.02 * k + 0.5
    assert np.isnan(E.time_to_quality(k, low, k, high)[0]) and E.speed_up([(k, low)], [(k, high)])["n"] == 0
    log_ratio, shared = E.time_to_quality(k, 0.1 * k, k, 0.05 * k)
    assert log_ratio < 0 and 0.4 < shared < 0.5, "only half of the reference's range is compared"


def test_isotonic_fits_are_monotone_and_leave_monotone_curves_alone():
    y = np.random.default_rng(0).standard_normal(30).cumsum()
    assert (np.diff(E.isotonic(y)) >= -1e-12).all() and np.allclose(E.isotonic(np.sort(y)), np.sort(y))


def simulated_runs(rng, tie: float, n=10, m=12):
    """Runs whose quality follows D's fall with strength `tie`; all share the same trends."""
    x, runs = np.linspace(5, 11, m), []
    for _ in range(n):
        own = rng.standard_normal(m).cumsum() * 0.02
        runs.append({"x": x, "D": 1 - 0.08 * (x - 5) - own, "quality": 0.1 * (x - 5) + tie * own + 0.01 * rng.standard_normal(m).cumsum()})
    return runs


def test_the_rate_correlation_sees_a_tie_and_not_two_common_trends():
    """D and quality always both move with training; only runs that are ahead in both at the same step count. Negative control: the
    plain correlation of the two curves is near -1 with no tie at all."""
    rng = np.random.default_rng(0)
    tied = [E.rate_correlation(simulated_runs(rng, 1.0)) for _ in range(5)]
    assert all(t["correlation"] > 0.5 and t["interval"][0] > 0 and t["p"] < 0.05 for t in tied)
    free = [E.rate_correlation(simulated_runs(rng, 0.0)) for _ in range(40)]
    assert np.mean([f["p"] <= 0.05 for f in free]) <= 0.125
    run = simulated_runs(rng, 0.0, n=1)[0]
    assert np.corrcoef(run["D"], run["quality"])[0, 1] < -0.8


# --- arms

def test_every_arm_is_valid_and_arms_of_an_experiment_differ():
    for name, e in E.EXPERIMENTS.items():
        assert e.reference in e.arms and len({json.dumps(o, sort_keys=True) for o in e.arms.values()}) == len(e.arms)
        for options in e.arms.values():
            probe = {**e.base, **options}
            if probe.get("regime", "").split(":")[0] in ("warped", "yoked", "ramp", "frozen"):
                probe["regime"] = "clock"
            train.resolve({**probe, "out": "unused"})


def test_a_warped_regime_keeps_its_range_and_order_and_differs_by_seed():
    steps = np.arange(10, 1_001, 10)
    r = np.linspace(0, 1, 100) ** 2
    a, b = E.warp(steps, r, 1_000, 0), E.warp(steps, r, 1_000, 1)
    assert len(a) == 1_000 and (np.diff(a) >= 0).all() and a.min() >= 0 and a.max() == 1 and not np.array_equal(a, b)


def test_replayed_sources_are_made_of_the_runs_they_name(tmp_path):
    for seed in (0, 1):
        folder = E.folder_of(tmp_path, "slope", seed)
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps({"step": k, "r": min(1.0, (0.01 + 0.01 * seed) * k)}) + "\n" for k in range(10, 101, 10)))
    read = lambda kind, seed: regime.read_r(E.source_file(kind, {"steps": 100}, tmp_path, "x", seed, [0, 1]).removeprefix("replay:"))[1]
    assert read("yoked:slope", 0)[49] == 1.0 and read("yoked:slope", 1)[49] == 0.5, "the other seed's"
    assert abs(read("ramp:0.5", 0)[24] - 0.5) < 1e-12 and read("ramp:0.5", 0)[99] == 1
    assert read("frozen", 0)[99] == 100 / train.Config().steps
    with pytest.raises(data.UserError, match="run arm 'fast' first"):
        E.source_file("warped:fast", {"steps": 100}, tmp_path, "x", 0, [0])
    with pytest.raises(data.UserError, match="at least --seeds 2"):
        E.source_file("yoked:slope", {"steps": 100}, tmp_path, "x", 0, [0])


# --- the runner

SMALL = ["--steps", "6", "--eval-every", "3", "--score-clips", "8", "--clips", "100"]
OWN = json.dumps({"recipe": "static", "width": 32, "depth": 2, "heads": 2, "batch": 8, "channels": 16, "sample_steps": 3, "precision": "fp32", "workers": 0, "variants": 1, "warmup": 4})


@pytest.fixture
def small(monkeypatch):
    """E1 at the size of the tests; a number that only the weights decide stands for the judges."""
    arms = {name: {**json.loads(OWN), "recipe": name} for name in ("vanilla", "static")}
    monkeypatch.setitem(E.EXPERIMENTS, "E1", E.Experiment("small", arms, "static"))
    quality = lambda run: float(run.model.head.weight.abs().mean())
    monkeypatch.setattr(evaluate, "dashboard", lambda *a: None)
    monkeypatch.setattr(evaluate, "preview", lambda run, val_set: {"event_accuracy": quality(run)})
    monkeypatch.setattr(evaluate, "score", lambda runs, clips, out, **k: out.write_text(json.dumps({"x": {"protocol": {}, "rows": [{"row": "model", "exact": quality(runs[0])}]}})))


def run(*argv):
    sys.argv = ["experiments.py", *map(str, argv)]
    E.main()


def rows_of(out):
    """Rows without what differs between two machines or moments."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "config", "commit")} for line in (out / "rows.jsonl").read_text().splitlines()]


def test_an_experiment_continues_where_it_stopped_and_gives_the_same_rows(small, tmp_path, monkeypatch, capsys):
    """Stopped inside its second run, continued: the rows of an uninterrupted one; what was finished is not run again."""
    run("run", "E1", "--seeds", 2, "--out", tmp_path / "whole", *SMALL)
    right, calls = train.train, []
    def stops(given, resume=""):
        calls.append(given)
        if len(calls) == 2:
            monkeypatch.setattr(evaluate, "preview", lambda *a: (signal.raise_signal(signal.SIGTERM), preview(*a))[1])
        return right(given, resume)
    preview = evaluate.preview
    monkeypatch.setattr(train, "train", stops)
    with pytest.raises(data.UserError, match="the same command continues"):
        run("run", "E1", "--seeds", 2, "--out", tmp_path / "half", *SMALL)
    monkeypatch.setattr(evaluate, "preview", preview)
    calls = []
    monkeypatch.setattr(train, "train", lambda given, resume="": (calls.append(given), right(given, resume))[1])
    run("run", "E1", "--seeds", 2, "--out", tmp_path / "half", *SMALL)
    assert len(calls) == 3 and calls[0] == {}, "one continued, two run, one found finished"
    whole, half = rows_of(tmp_path / "whole"), rows_of(tmp_path / "half")
    assert len(whole) == 8 and whole == half
    text = capsys.readouterr().out
    assert "DESCRIPTIVE" in text and "smallest p that 2 seeds can reach: 0.5" in text and (tmp_path / "half" / "figure.png").exists()


def test_your_own_arm_joins_the_table_and_a_failing_one_costs_nothing_else(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "arms.json").write_text(json.dumps({"from a file": {**json.loads(OWN), "lr": 1e-3}}))
    right = train.train
    def fails(given, resume=""):
        if given.get("recipe") == "vanilla":
            raise RuntimeError("out of luck")
        return right(given, resume)
    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(SystemExit) as stop:
        run("run", "E1", "--seeds", 1, "--out", tmp_path / "x", "--arm", f"mine={OWN}", "--arms", tmp_path / "arms.json", *SMALL)
    text = capsys.readouterr().out
    assert stop.value.code == 1 and "FAILED vanilla, seed 0: RuntimeError: out of luck" in text
    table = (tmp_path / "x" / "table.txt").read_text()
    assert all(any(line.startswith(name) for line in table.splitlines()) for name in ("mine", "from a file", "static")) and "vanilla                    0   no finished run" in table
    mine = next(r for r in json.loads((tmp_path / "x" / "summary.json").read_text()) if r["arm"] == "mine")
    assert mine["against"]["difference"] == 0 and mine["speed_up_step"]["ratio"] in (1.0,) or np.isnan(mine["speed_up_step"]["ratio"]), "the same options as the reference"


def test_a_dry_run_tells_arms_and_hours_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "experiments.py", "run", "E1", "--dry-run", "--seeds", "3", "--out", tmp_path / "x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "5 arms x 3 seeds" in done.stdout and "hours" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, message", [
    (("run", "E9"), "invalid choice: 'E9'"),
    (("run", "E1", "--arm", "mine"), "must be NAME={...}"),
    (("run", "E1", "--arm", 'mine={"lambda9": 1}'), "train.py has no option 'lambda9'"),
    (("run", "E1", "--arm", 'mine={"batch": 0}'), "--batch 0: must be positive"),
    (("run", "E1", "--only", "soup"), "no such arm"),
    (("run", "E1", "--seeds", "0"), "--seeds 0: must be positive"),
    (("run", "E1", "--arms", "none.json"), "none.json: not a JSON file"),
    (("table", "."), "no experiment.json"),
])
def test_bad_input_ends_with_status_2_and_one_line(tmp_path, argv, message):
    done = in_process(E, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
