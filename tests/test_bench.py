"""Claims about the benchmark: arms take turns, and every row says what it measured."""
import functools
import json

import numpy as np
import pytest
from conftest import in_process

import regime
import sampler
from lab import bench
from parts import config, runs


def test_arms_take_turns_and_a_slower_one_is_told_by_its_ratio(monkeypatch):
    """By a clock that only arms move, by more or less the same each time."""
    order, now, rng = [], [0.0], np.random.default_rng(0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def work(name, seconds):
        order.append(name)
        now[0] += seconds * rng.uniform(0.9, 1.1)

    arms = {"a": functools.partial(work, "a", 0.002), "b": functools.partial(work, "b", 0.006)}
    seconds = bench.in_turns(arms, rounds=12, warm_up=2)
    assert len(order) == 28 and len(seconds["a"]) == 12
    assert all(set(order[k : k + 2]) == {"a", "b"} for k in range(0, 28, 2))
    there = bench.ratio(seconds["b"], seconds["a"])
    back = bench.ratio(seconds["a"], seconds["b"])
    low, high = there["interval"]
    assert 2.5 < low < 3 < high < 3.5 and abs(there["ratio"] * back["ratio"] - 1) < 1e-9


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path, monkeypatch):
    """At a tiny shape with blocks enough to be checked: every row, with its interval; a table; JSON."""
    in_turns = bench.in_turns

    def once(arms, rounds, warm_up=0):
        return in_turns(arms, rounds, warm_up)

    tiny = {"width": 32, "depth": 6, "heads": 2, "batch": 8, "channels": 16, "sample_steps": 2}
    monkeypatch.setitem(config.PRESETS, "smoke", (tiny, {"variants": 1}))
    monkeypatch.setattr(bench, "matmul_rate", lambda *a: 1e9)
    monkeypatch.setattr(bench, "in_turns", once)
    monkeypatch.setattr(bench, "bench_generation", functools.partial(bench.bench_generation, sizes=(2,)))
    monkeypatch.setattr(bench, "bench_data", functools.partial(bench.bench_data, sizes=(1, 2)))
    monkeypatch.setattr(bench, "bench", functools.partial(bench.bench, clips=100))
    done = in_process(bench, "--preset", "smoke", "--device", "cpu", "--rounds", 3,
                      "--out", tmp_path / "b.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "b.json").read_text())

    steps = result["steps"]
    assert {(row["task"], row["precision"], row["arm"]) for row in steps} == {
        (task, precision, arm) for task in ("t2a", "sr") for precision in ("fp32", "bf16")
        for arm in ("plain", "vanilla", "static", "stage", "AdamW")}
    assert all(row["against_plain"]["ratio"] == 1 for row in steps if row["arm"] == "plain")
    assert all(row["saved_mb"] > 0 and row["flop_per_s"] > 0 for row in steps)

    assert {run["task"] for run in result["run"]} == {"t2a", "sr"}
    for run in result["run"]:
        assert abs(sum(run["parts_of_a_stage_step"].values()) - 1) < 1e-9
        assert all(run["ms"][name] > 0 for name in ("probe", "check", "agreement", "share"))
        short, long = run["stage_over_static"]
        assert (short["steps"], long["steps"]) == (400, 3_000)
        assert short["ratio"] > long["ratio"] > run["step"]["ratio"] > 0
        assert 1 > short["probe_share"] > long["probe_share"] > 0
    for words in ("stage over static, 400 steps", "stage over static, 3000 steps", "of its seconds",
                  "x real time", "saved MB"):
        assert words in done.stdout


SECONDS = {"static": 2.0, "stage": 3.0, "probe": 5.0, "check": 7.0, "agreement": 11.0, "share": 13.0}


def slow_cost(K: int) -> tuple[float, float, float]:
    """Seconds of a run of stage, of one of static, and of the probes: step by step, as train.py's loop
    goes, with structure on after half the run."""
    stage = static = probes = 0.0
    for k in range(1, K + 1):
        j = regime.Regime("slope", K).probe_index(k)
        stage, static = stage + SECONDS["stage"], static + SECONDS["static"]
        if j is not None:
            probes += SECONDS["probe"]
            stage += SECONDS["probe"] + SECONDS["check"] + SECONDS["share"] * (k > K / 2)
            stage += SECONDS["agreement"] * (j % 2 == 0)
            static += SECONDS["agreement"] * (j % 2 == 0)
    return stage, static, probes


@pytest.mark.parametrize("K", [400, 500])
def test_what_a_run_costs_is_the_sum_over_its_steps_probes_checks_and_gradients(K):
    """Rounds of one length have no spread. Negative control: without probes and what comes with them it
    is the step."""
    cost = bench.run_cost(K, {name: np.full(4, s) for name, s in SECONDS.items()})
    stage, static, probes = slow_cost(K)
    assert [cost["ratio"], *cost["interval"]] == pytest.approx([stage / static] * 3)
    assert cost["probe_share"] == pytest.approx(probes / stage)
    alone = {name: np.full(4, s if name in ("static", "stage") else 0.0) for name, s in SECONDS.items()}
    assert bench.run_cost(K, alone)["ratio"] == pytest.approx(1.5) != pytest.approx(cost["ratio"])
    assert bench.run_cost(K, alone)["probe_share"] == 0


def test_the_arms_are_driven_as_their_names_say():
    cfg = config.resolve({"device": "cpu", "out": "unused"})
    vanilla, static, stage = (bench.driven_by(cfg, arm) for arm in ("vanilla", "static", "stage"))
    assert (vanilla.lam, vanilla.share, vanilla.mu) == (0, 0, 0)
    assert vanilla.density == sampler.LogitNormal()
    assert (static.lam, static.share, static.mu) == (cfg.lambda0, 0, 0)
    assert static.density == sampler.LogitNormal(cfg.m, cfg.s)
    assert stage.share > 0 and stage.mu > 0
    assert stage._replace(share=0.0, mu=0.0) == static


def test_too_few_rounds_end_with_one_line(tmp_path):
    done = in_process(bench, "--rounds", 2, cwd=tmp_path)
    assert done.returncode == 2 and "--rounds 2: must be at least 3" in done.stderr


def test_hours_grow_with_the_steps_and_a_shape_is_measured_once(monkeypatch):
    measured = []

    def measure_shape(cfg, tokens):
        measured.append(cfg.width)
        return 0.36, 0.01

    monkeypatch.setattr(bench, "_measure_shape", measure_shape)
    base = {"device": "cpu", "preset": "smoke", "eval_every": 10**6, "width": 32}
    one, two, both = (bench.estimate_hours(options) for options in (
        [{**base, "steps": 10_000}], [{**base, "steps": 20_000}],
        [{**base, "steps": 10_000}, {**base, "steps": 20_000}]))
    assert both == pytest.approx(one + two) and measured == [32, 32, 32]
    assert two - one == pytest.approx(1.25), "10,000 steps of 0.36 s, and a quarter"


@pytest.mark.parametrize("every", [0, 150, 1_000])
def test_evaluations_are_counted_as_the_loop_makes_them(every):
    for K in (40, 100, 512, 1_000):
        cfg = config.Config(steps=K, eval_every=every)
        stage = regime.Regime("slope", K)
        due = [k for k in range(1, K + 1) if runs.evaluation_due(cfg, k, stage.probe_index(k))]
        assert bench._evaluations(cfg) == len(due)
