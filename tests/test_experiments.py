"""Claims about the experiments: statistics on simulated arms, the runner, the user's own arms."""
import base64
import html.parser
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import scipy.stats
import torch
from conftest import ROOT, in_process

import config
import data
import evaluate
import experiments as E
import regime
import train

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
    for e in E.EXPERIMENTS.values():
        assert all(E.reference_of(arm, e.arms, e.reference) for arm in e.arms) and len({json.dumps(o, sort_keys=True) for o in e.arms.values()}) == len(e.arms)
        for options in e.arms.values():
            probe = {**e.base, **options}
            if E.derived(probe):
                probe["regime"] = "clock"
            config.resolve({**probe, "out": "unused"})


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
        with pytest.raises(data.UserError, match="of a run that has not ended"):
            E.source_file("warped:slope", {"steps": 100}, tmp_path, "x", seed, [seed])
        (folder / "scores.json").touch()
    read = lambda kind, seed: regime.read_r(E.source_file(kind, {"steps": 100}, tmp_path, "x", seed, [0, 1]).removeprefix("replay:"))[1]
    assert read("yoked:slope", 0)[49] == 1.0 and read("yoked:slope", 1)[49] == 0.5, "the other seed's"
    assert abs(read("ramp:0.5", 0)[24] - 0.5) < 1e-12 and read("ramp:0.5", 0)[99] == 1
    with pytest.raises(data.UserError, match="run arm 'fast' first"):
        E.source_file("warped:fast", {"steps": 100}, tmp_path, "x", 0, [0])
    with pytest.raises(data.UserError, match="at least --seeds 2"):
        E.source_file("yoked:slope", {"steps": 100}, tmp_path, "x", 0, [0])


def fabricated(arms, seeds, final, curve=lambda arm, seed, k: 0.5, steps=(10, 20, 40, 80), **more):
    """Rows as `collect` writes them, of runs that never were."""
    return [{"experiment": "x", "arm": arm, "seed": seed, "step": k, "seconds": k / 2, "event_accuracy": curve(arm, seed, k), "r": 0.0,
             **{name: f(arm, seed, k) for name, f in more.items()}, **({"final": {"exact": final(arm, seed)}} if k == steps[-1] else {})}
            for arm in arms for seed in seeds for k in steps]


def test_an_arm_of_a_setting_is_compared_within_its_setting():
    arms = {"home: stage": {}, "home: clock": {}, "away: stage": {}, "away: clock": {}, "stage": {}, "mine": {}}
    assert [E.reference_of(a, arms, "stage") for a in arms] == ["home: stage"] * 2 + ["away: stage"] * 2 + ["stage"] * 2
    level = {"home: stage": 0.5, "home: clock": 0.6, "away: stage": 0.3, "away: clock": 0.1}
    rows = fabricated(level, [0, 1, 2], lambda arm, seed: level[arm] + 0.01 * seed)
    found = {r["arm"]: r.get("against", {}).get("difference") for r in E.summarize(rows, {k: {} for k in level}, [0, 1, 2], "stage")}
    assert found["home: stage"] is None and abs(found["home: clock"] - 0.1) < 1e-9 and abs(found["away: clock"] + 0.2) < 1e-9


def test_what_a_gain_costs_in_other_metrics_is_in_the_table_and_a_metric_that_one_run_lacks_is_not():
    arms, kid = {"static": {}, "stage": {}}, {"static": 0.1, "stage": 0.14}
    rows = fabricated(arms, [0, 1, 2], lambda arm, seed: 0.5, val_loss=lambda arm, seed, k: 0.9 + 0.01 * seed)
    for r in rows:
        if "final" in r:
            r["final"] |= {"kid": kid[r["arm"]] + 0.01 * r["seed"], **({"event_kl": 0.2} if r["seed"] else {})}
    found = E.also(rows, arms, [0, 1, 2], "static")
    assert set(found) == {"stage"} and set(found["stage"]) == {"kid", "val_loss"}
    assert abs(found["stage"]["kid"]["difference"] - 0.04) < 1e-9 and found["stage"]["val_loss"]["difference"] == 0
    assert "kid +0.040 [+0.040, +0.040]" in E.table("E1", rows, arms, [0, 1, 2], "static")


def test_seconds_are_compared_only_where_every_run_has_some_that_count(tmp_path):
    """An arm that ran on another day keeps its steps and says no seconds."""
    arms = {"static": {}, "clock": {}, "stage": {}}
    rows = fabricated(arms, [0, 1, 2], lambda arm, seed: 0.5, lambda arm, seed, k: 0.01 * k)
    for r in rows:
        if r["arm"] == "clock":
            del r["seconds"]
    _, clock, stage = E.summarize(rows, arms, [0, 1, 2], "static")
    assert "speed_up_seconds" in stage and "speed_up_step" in clock and "speed_up_seconds" not in clock
    E.figure(tmp_path, "E1", rows, arms, [0, 1, 2])
    assert (tmp_path / "figure.png").is_file()


def test_the_clocks_of_e7_are_chosen_by_setting_on_seeds_that_the_table_does_not_use(tmp_path):
    arms, (home, away) = E.EXPERIMENTS["E7"].arms, ("home", "batch 16")
    level = lambda arm, seed: {f"{home}: clock to 0.5 K": 0.9, f"{away}: clock to 2 K": 0.8}.get(arm, 0.5)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in fabricated(arms, [0, 1], level)))
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": "E7", "arms": arms, "seeds": [0, 1], "reference": "stage", "pilot": False}))
    chosen = E.tuned_clocks(arms, tmp_path, [2, 3])
    assert [a for a in chosen if a.startswith(home)] == [f"{home}: stage", f"{home}: static", f"{home}: clock to 0.5 K (frozen, re-tuned)"]
    assert [a for a in chosen if a.startswith(away)] == [f"{away}: stage", f"{away}: static", f"{away}: clock to 0.5 K (frozen)", f"{away}: clock to 2 K (re-tuned)"]
    assert chosen[f"{away}: clock to 2 K (re-tuned)"] == {"batch": 16, "recipe": "stage", "regime": "ramp:2"}
    some = {k: v for k, v in arms.items() if k.startswith((home, away))}  # a development run of two settings asks for two settings
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": "E7", "arms": some, "seeds": [0, 1], "reference": "stage", "pilot": False}))
    assert E.tuned_clocks(arms, tmp_path, [2, 3]) == {k: v for k, v in chosen.items() if k.startswith((home, away))}
    with pytest.raises(data.UserError, match="chosen on seed 1 too.*--first-seed 2"):
        E.tuned_clocks(arms, tmp_path, [1, 2])


def test_e5_tells_semantics_from_detail_and_leaves_out_what_was_not_asked():
    """Runs whose recall follows D and whose pitch does not; order was asked of nobody at the first evaluations."""
    rng, arms, steps = np.random.default_rng(0), [f"run {k}" for k in range(10)], (25, 50, 100, 200, 400, 800)
    ahead = {a: dict(zip(steps, rng.standard_normal(6).cumsum() * 0.05)) for a in arms}
    free = {a: dict(zip(steps, rng.standard_normal(6).cumsum() * 0.05)) for a in arms}
    rows = fabricated(arms, [0], lambda a, s: 0.5, lambda a, s, k: 0.1 * np.log2(k) + ahead[a][k], steps, D=lambda a, s, k: 1 - 0.08 * np.log2(k) - ahead[a][k],
                      recall=lambda a, s, k: 0.1 * np.log2(k) + ahead[a][k] + 0.01 * free[a][k], pitch=lambda a, s, k: 0.1 * np.log2(k) + free[a][k],
                      order=lambda a, s, k: None if k < 400 else 0.5)
    found = E.track(rows)
    assert found["recall"]["interval"][0] > 0.5 and found["pitch"]["interval"][0] < 0.2 and "order" not in found and found["recall"]["points"] == 5
    assert "recall (semantic)" in E.track_table(rows) and "pitch (detail)" in E.track_table(rows)


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
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "config", "commit", "threads")} for line in (out / "rows.jsonl").read_text().splitlines()]


def test_an_experiment_continues_where_it_stopped_and_gives_the_same_rows(small, tmp_path, monkeypatch, capsys):
    """Stopped inside its second run, continued: the rows of an uninterrupted one; what was finished is not run again."""
    run("run", "E1", "--seeds", 2, "--out", tmp_path / "elsewhere" / "whole", *SMALL)
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
    whole, half = rows_of(tmp_path / "elsewhere" / "whole"), rows_of(tmp_path / "half")
    assert len(whole) == 8 and whole == half
    text = capsys.readouterr().out
    assert "DESCRIPTIVE" in text and "smallest p that 2 seeds can reach: 0.5" in text and (tmp_path / "half" / "figure.png").exists()


@pytest.mark.parametrize("commit, settings, again", [("abc", {}, 0), ("abc", {"lambda0": 0.25}, 1), ("abc+", {}, 1), ("", {}, 1)])
def test_a_run_that_another_experiment_has_made_is_taken_over_and_never_one_of_other_code_or_settings(small, tmp_path, monkeypatch, commit, settings, again):
    """The same settings at the same commit; code that is not committed, or is unknown, is not the same code."""
    made, right, calls = {"commit": "abc"}, train.train, []
    monkeypatch.setattr(E, "provenance", lambda: made)
    run("run", "E1", "--seeds", 1, "--only", "static", "--out", tmp_path / "a", *SMALL)
    made["commit"] = commit
    monkeypatch.setattr(train, "train", lambda given, resume="": (calls.append(given), right(given, resume))[1])
    mine = json.dumps({**json.loads(OWN), "recipe": "static", **settings})
    run("run", "E6", "--seeds", 1, "--only", "mine", "--arm", f"mine={mine}", "--out", tmp_path / "b", *SMALL)
    old, new = (rows_of(tmp_path / n) for n in "ab")
    assert len(calls) == again and len(new) == 2 and (again or [r["event_accuracy"] for r in new] == [r["event_accuracy"] for r in old])
    with open(E.folder_of(tmp_path / "b", "mine", 0) / "log.jsonl", "a") as f:
        f.write("more\n")
    assert "more" not in (E.folder_of(tmp_path / "a", "static", 0) / "log.jsonl").read_text()


def test_the_table_is_made_again_from_the_rows_where_the_runs_are_gone(small, tmp_path, capsys):
    run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL)
    before, rows = (tmp_path / "table.txt").read_text(), (tmp_path / "rows.jsonl").read_text()
    shutil.rmtree(tmp_path / "runs")
    run("table", tmp_path)
    assert (tmp_path / "table.txt").read_text() == before and (tmp_path / "rows.jsonl").read_text() == rows
    made = json.loads(rows.splitlines()[-1])
    assert made["commit"] and made["torch"] and made["machine"] and made["threads"] and made["config"]["recipe"] == "static"


def test_a_folder_of_other_runs_is_refused_and_rows_of_arms_not_asked_for_are_kept(small, tmp_path):
    run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL)
    rows = {(r["arm"], r["seed"]) for r in rows_of(tmp_path)}
    with pytest.raises(data.UserError, match="a run with steps 6, not 9"):
        run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL, "--steps", "9")
    run("run", "E1", "--seeds", 1, "--only", "static", "--out", tmp_path, *SMALL)
    assert {(r["arm"], r["seed"]) for r in rows_of(tmp_path)} == rows == {("vanilla", 0), ("static", 0)}
    shutil.rmtree(tmp_path / "runs")
    run("table", tmp_path)
    other = json.loads((tmp_path / "experiment.json").read_text())
    other["arms"]["static"]["lr"] = 1.0
    assert E.collect(tmp_path, "E1", other["arms"], [0]) == [], "rows made with other options are not this arm's"


def test_precision_is_measured_once_an_experiment(small, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(E, "precision_here", lambda cfg: measured.append(cfg.precision) or "fp32")
    arms = {name: {k: v for k, v in options.items() if k != "precision"} for name, options in E.EXPERIMENTS["E1"].arms.items()}
    monkeypatch.setitem(E.EXPERIMENTS, "E1", E.Experiment("small", arms, "static"))
    run("run", "E1", "--seeds", 1, "--only", "static", "--out", tmp_path, *SMALL)
    run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL)
    assert measured == ["auto"] and {json.loads(line)["config"]["precision"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()} == {"fp32"}


TWO = [x for name, lr in (("a", 1e-3), ("b", 2e-3)) for x in ("--arm", f"{name}=" + json.dumps({**json.loads(OWN), "lr": lr}))]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_packed_runs_killed_with_their_parent_continue_to_the_rows_of_a_serial_experiment(tmp_path):
    """kill -9 of the parent while both of its workers train: they save and end by themselves; the same command goes on."""
    argv = ["run", "E1", "--only", "a", "b", *TWO, "--seeds", "1", "--steps", "60", "--eval-every", "30", "--score-clips", "8", "--clips", "100"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, data.cores() // 2))
        run(*argv, "--out", tmp_path / "elsewhere" / "serial")
    finally:
        torch.set_num_threads(threads)
    parent = subprocess.Popen([sys.executable, ROOT / "experiments.py", *argv, "--jobs", "2", "--out", tmp_path / "packed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = [E.folder_of(tmp_path / "packed", arm, 0) / "log.jsonl" for arm in "ab"]
    until(lambda: any(log.is_file() and '"eval"' in log.read_text() for log in logs))
    workers = [p.parent for p in Path("/proc").glob("[0-9]*/stat") if status(p)[1:2] == [str(parent.pid)]]
    parent.kill()
    parent.wait()
    assert len(workers) >= 2
    until(lambda: all(status(w / "stat")[:1] in ([], ["Z"]) for w in workers))
    assert not any((log.parent / "scores.json").exists() for log in logs), "killed too late to prove anything"
    run(*argv, "--jobs", "2", "--out", tmp_path / "packed")
    serial, packed = rows_of(tmp_path / "elsewhere" / "serial"), rows_of(tmp_path / "packed")
    assert len(serial) == 4 and serial == packed
    assert "trained 60 steps" in logs[0].parent.with_name("a-s0.txt").read_text(), "each run's own lines are beside it"


def until(condition, seconds=120):
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def status(stat):
    """/proc/PID/stat -> [state, parent, ...]; [] where the process is gone."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def test_a_report_is_one_page_that_asks_nobody_and_cannot_be_written_into(t2a_run, sr_run, tmp_path, monkeypatch):
    """Results, curves, sounds of both tasks, differing settings; a caption that is markup stays text."""
    monkeypatch.setattr(data.SoundWorld, "caption", lambda self, i, k=0: f"<script>alert({i})</script> & bell")
    moved = shutil.copytree(t2a_run, tmp_path / "t2a")             # twelve steps hold no probe: give it a regime to draw
    with open(moved / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 12, "r": 0.5}) + "\n")
    page = Page(tmp_path / "r.html", moved, sr_run)
    assert page.count("audio") == 2 * 3 + 2 * 4 and page.count("script") == 0 and "<script>alert" in page.text and "& bell" in page.text
    assert all(url.startswith("data:") for url in page.urls) and page.count("title") == 1
    wav = base64.b64decode(page.sources("audio")[0].split(",")[1])
    rate, x = scipy.io.wavfile.read(io.BytesIO(wav))
    assert rate == data.RATE and len(x) == 40_960
    assert "event set" in page.text and "energy score" in page.text and "codec ceiling" in page.text and "muffled input" in page.text
    assert page.differing >= {"t2a", "sr"} - {page.first_task} and "Validation loss" in page.text and "Regime r" in page.text


class Page(html.parser.HTMLParser):
    """A report made of runs, and what a browser would find in it."""

    def __init__(self, path, *runs):
        super().__init__()
        self.tags, self.text, self.urls, self.differing, self.inside, self.first_task = [], "", [], set(), False, json.loads((runs[0] / "config.json").read_text())["task"]
        E.report([Path(r) for r in runs], path, clips=2)
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.urls += [v for k, v in attrs if k in ("src", "href")]
        self.inside = ("class", "differs") in attrs

    def handle_data(self, text):
        self.text += text
        if self.inside:
            self.differing.add(text)

    def count(self, tag):
        return sum(t == tag for t, _ in self.tags)

    def sources(self, tag):
        return [a["src"] for t, a in self.tags if t == tag]


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
    done = subprocess.run([sys.executable, ROOT / "experiments.py", "run", "E1", "--dry-run", "--seeds", "3", "--out", tmp_path / "x"], capture_output=True, text=True, check=False, cwd=tmp_path)
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
    (("run", "E1", "--tuned", "x"), "--tuned belongs to E7"),
    (("run", "E7", "--tuned", "x"), "--tuned x: no experiment.json"),
    (("report", ".", "--out", "x.txt"), "--out x.txt: must name an .html file"),
    (("report", "."), "not a run folder"),
])
def test_bad_input_ends_with_status_2_and_one_line(tmp_path, argv, message):
    done = in_process(E, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
