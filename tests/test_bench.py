"""Claims about the benchmark: arms take turns, and every row says what it measured."""
import functools
import json
import time

import pytest
from conftest import in_process

from lab import bench
from parts import config


def test_arms_take_turns_and_a_slower_one_is_told_by_its_ratio():
    order = []

    def sleep(name, seconds):
        order.append(name)
        time.sleep(seconds)

    arms = {"a": functools.partial(sleep, "a", 0.002), "b": functools.partial(sleep, "b", 0.006)}
    seconds = bench.in_turns(arms, rounds=12, warm_up=2)
    assert len(order) == 28 and len(seconds["a"]) == 12
    assert all(set(order[k : k + 2]) == {"a", "b"} for k in range(0, 28, 2))
    there = bench.ratio(seconds["b"], seconds["a"])
    back = bench.ratio(seconds["a"], seconds["b"])
    assert there["interval"][0] > 1.5 and abs(there["ratio"] * back["ratio"] - 1) < 1e-9


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path, monkeypatch):
    """At a tiny shape: every row there, with its interval; a table; JSON."""
    tiny = {"width": 32, "depth": 2, "heads": 2, "batch": 8, "channels": 16, "sample_steps": 2}
    monkeypatch.setitem(config.PRESETS, "smoke", (tiny, {"variants": 1}))
    monkeypatch.setattr(bench, "matmul_rate", lambda *a: 1e9)
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
        for arm in ("plain", "vanilla", "stage", "AdamW")}
    assert all(row["against_plain"]["ratio"] == 1 for row in steps if row["arm"] == "plain")
    assert all(row["saved_mb"] > 0 and row["flop_per_s"] > 0 for row in steps)

    assert {run["task"] for run in result["run"]} == {"t2a", "sr"}
    for run in result["run"]:
        assert abs(sum(run["parts_of_a_stage_step"].values()) - 1) < 1e-9
        assert run["stage_over_vanilla"]["ratio"] > run["step"]["ratio"] > 0
    for words in ("stage over vanilla", "x real time", "saved MB"):
        assert words in done.stdout


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
