"""Claims about the runner: sources of r that are made of other runs, and what a run says it was made with."""
import json
import shutil
import subprocess

import numpy as np
import pytest
from fabricated import fabricated_run

import regime
from lab import runner
from lab.questions import EXPERIMENTS
from parts.errors import UserError


def test_a_warped_regime_keeps_its_range_and_order_and_differs_by_seed():
    steps = np.arange(10, 1_001, 10)
    r = np.linspace(0, 1, 100) ** 2
    a, b = runner.warp(steps, r, 1_000, 0), runner.warp(steps, r, 1_000, 1)
    assert len(a) == 1_000 and (np.diff(a) >= 0).all()
    assert a.min() >= 0 and a.max() == 1
    assert not np.array_equal(a, b)


def test_a_warped_regime_is_r_at_the_share_u_to_a_power_between_a_half_and_two():
    """Of r = k / K what is warped is u^g itself; log2 g is uniform in [-1, 1], whose deviation is 0.577."""
    steps = np.arange(1, 10_001)
    u, exponents = steps[99:] / 10_000, []
    for seed in range(60):
        warped = runner.warp(steps, steps / 10_000, 10_000, seed)[99:]
        g = np.log(warped[:-1]) / np.log(u[:-1])
        late = (u[:-1] > 0.2) & (u[:-1] < 0.8)             # elsewhere one step of r moves g
        assert g[late].std() < 0.01
        exponents.append(np.log2(np.median(g[late])))
    assert np.abs(exponents).max() <= 1.01 and abs(np.mean(exponents)) < 0.2
    assert 0.45 < np.std(exponents) < 0.7


def test_replayed_sources_are_made_of_the_runs_they_name(tmp_path):
    options = {"steps": 100}
    for seed in (0, 1):
        folder = runner.folder_of(tmp_path, "slope", seed)
        folder.mkdir(parents=True)
        rows = [{"step": k, "r": min(1.0, (0.01 + 0.01 * seed) * k)} for k in range(10, 101, 10)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match="of a run that has not ended"):
            runner.source_file("warped:slope", options, tmp_path, "x", seed, [seed])
        (folder / "scores.json").touch()

    def r_of(source, seed):
        made = runner.source_file(source, options, tmp_path, "x", seed, [0, 1])
        return regime.read_r(made.removeprefix("replay:"))[1]

    warped = runner.warp(*regime.read_r(runner.folder_of(tmp_path, "slope", 0) / "log.jsonl"), 100, 0)
    assert np.array_equal(r_of("warped:slope", 0), warped), "and not the very r that was measured"
    assert r_of("yoked:slope", 0)[49] == 1.0 and r_of("yoked:slope", 1)[49] == 0.5, "the other seed's"
    # Permuted and reversed: the very values of the run, so the same averages.
    in_order = regime.hold_last(*regime.read_r(runner.folder_of(tmp_path, "slope", 0) / "log.jsonl"),
                                np.arange(1, 101))
    permuted = r_of("permuted:slope", 0)
    assert np.array_equal(np.sort(permuted), np.sort(in_order)) and not np.array_equal(permuted, in_order)
    assert np.array_equal(permuted, r_of("permuted:slope", 0)), "a resumed run replays the same"
    assert np.array_equal(r_of("reversed:slope", 0), in_order[::-1])
    assert abs(r_of("ramp:0.5", 0)[24] - 0.5) < 1e-12 and r_of("ramp:0.5", 0)[99] == 1
    with pytest.raises(UserError, match="run arm 'fast' first"):
        runner.source_file("warped:fast", options, tmp_path, "x", 0, [0])
    with pytest.raises(UserError, match="at least --seeds 2"):
        runner.source_file("yoked:slope", options, tmp_path, "x", 0, [0])


def test_a_run_whose_folder_is_gone_is_replayed_from_its_rows_as_from_its_log(tmp_path):
    arms, options = {"slope": {"recipe": "stage", "steps": 40}}, {"steps": 40}
    folder = fabricated_run(tmp_path, "slope", arms["slope"], 0, [0])

    def replayed():
        made = runner.source_file("reversed:slope", options, tmp_path, "x", 0, [0])
        return regime.read_r(made.removeprefix("replay:"))[1]
    from_log = replayed()
    runner.collect(tmp_path, "E3", arms, [0])
    shutil.rmtree(folder)
    assert np.array_equal(replayed(), from_log) and len(set(from_log)) == 3


def test_a_run_that_replays_another_is_trained_with_its_r_and_its_rows_say_what_was_asked_for(
        tmp_path, monkeypatch):
    """And D of a row is that of the log's probes, on a line in log2 k."""
    arms = {"slope": {"recipe": "stage", "steps": 40},
            "back": {"recipe": "stage", "steps": 40, "regime": "reversed:slope"}}
    log, asked = fabricated_run(tmp_path, "slope", arms["slope"], 0, [0]) / "log.jsonl", []

    def trained(given, resume="", quick=None):
        asked.append(given["regime"])
        fabricated_run(tmp_path, "back", {**arms["back"], "regime": given["regime"]}, 0, [0])
    monkeypatch.setattr(runner.train, "train", trained)
    monkeypatch.setattr(runner.evaluate, "load_run", lambda *a: None)
    monkeypatch.setattr(runner, "final_axes", lambda run: {})
    commits = iter([*"aabb"])                              # one is made while the run is trained
    monkeypatch.setattr(runner, "provenance", lambda device="cpu": {"commit": next(commits)})
    runner.run_arm(tmp_path, "back", arms["back"], 0, [0])
    made = json.loads((runner.folder_of(tmp_path, "back", 0) / "made.json").read_text())
    assert made == {"commit": "a"} and not list(tmp_path.glob("runs/*.commits.json"))
    (replayed,) = asked
    r = regime.hold_last(*regime.read_r(log), np.arange(1, 41))
    assert np.array_equal(regime.read_r(replayed.removeprefix("replay:"))[1], r[::-1])
    rows = [row for row in runner.collect(tmp_path, "E3", arms, [0]) if row["arm"] == "back"]
    assert {row["config"]["regime"] for row in rows} == {"reversed:slope"}
    assert [row["D"] for row in rows] == pytest.approx([np.log2(10), np.log2(20), 5])


def test_a_discrepancy_that_was_not_finite_is_passed_over_in_a_runs_rows(tmp_path):
    """It is null in the log. D of a row is then on the line between the probes beside it."""
    log = fabricated_run(tmp_path, "clock", {"recipe": "clock"}, 0, [0]) / "log.jsonl"

    def D_of_rows():
        return [row["D"] for row in runner.collect(tmp_path, "E3", {"clock": {"recipe": "clock"}}, [0])]
    before = D_of_rows()
    log.write_text(log.read_text() + json.dumps({"step": 16, "D": None}) + "\n")
    assert D_of_rows() == before
    log.write_text(log.read_text().replace("null", "9.0"))
    assert D_of_rows() != before, "a number there would have counted"


SEEDS = [3, 5, 9]


def replayed_by(options, seed):
    """The run (arm, seed) that a run with these options replays; None: it replays none."""
    kind, _, what = options.get("regime", "").partition(":")
    if kind in ("warped", "permuted", "reversed"):
        return what, seed
    return (what, SEEDS[(SEEDS.index(seed) + 1) % 3]) if kind == "yoked" else None


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_shards_share_all_runs_and_none_waits_for_what_another_makes(name, n):
    """With arms beside it that replay what replays another run, or themselves."""
    some = next(iter(EXPERIMENTS[name].arms))
    arms = {**EXPERIMENTS[name].arms, "again": {"regime": "permuted:later"},
            "later": {"regime": f"yoked:{some}"}, "round": {"regime": "warped:round"}}
    shards = [runner.share(arms, SEEDS, k, n) for k in range(1, n + 1)]
    dealt = [run for runs in shards for run in runs]
    assert sorted(dealt) == sorted((arm, seed) for arm in arms for seed in SEEDS)
    for runs in shards:
        sources = [replayed_by(arms[arm], seed) for arm, seed in runs]
        assert all(source is None or source in runs for source in sources)


def test_a_shard_has_whole_seeds_so_that_arms_are_compared_on_one_machine():
    arms = dict.fromkeys("abcde", {})
    shards = [runner.share(arms, SEEDS, k, 2) for k in (1, 2)]
    assert [sorted({seed for _, seed in runs}) for runs in shards] == [[3, 9], [5]]
    assert [len(runs) for runs in shards] == [10, 5]
    assert shards[1] == runner.share(arms, SEEDS, 2, 2) and shards[0][0] == ("a", 3)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_arms_of_every_experiment_have_a_source_of_r_that_can_be_made(name):
    """E7's slowest clock reaches 1 after twice the steps, which it never gets to."""
    arms = EXPERIMENTS[name].arms
    for arm, options in arms.items():
        runner.refuse_unknown_source(arm, options, arms)
    for share in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(UserError, match="a positive share of the steps"):
            runner.refuse_unknown_source("mine", {"regime": f"ramp:{share}"}, arms)


def test_recorded_rows_are_of_other_settings_where_a_setting_that_was_not_typed_differs(tmp_path):
    """What a recipe sets, or a default that has changed since."""
    made_with = vars(runner.resolve_arm({"recipe": "static"}, seed=0))
    row = {"arm": "static", "seed": 0, "final": {"exact": 0.5}}

    def record(**other):
        config = {**made_with, **other}
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "config": config}) + "\n")
        other = runner.other_rows(tmp_path, arms, [0])
        found = runner.recorded_runs(tmp_path, arms, [0], [("static", 0)])
        assert found == (set() if other else {("static", 0)})
        return other

    arms = {"static": {"recipe": "static"}}
    assert record() is None and record(device="elsewhere", workers=3) is None
    assert "regime_signal t1.0, not levels" in record(regime_signal="t1.0")
    arms = {"static": {"recipe": "vanilla"}}
    assert "guidance constant, not off" in record()


@pytest.mark.parametrize("changed, mark", [("train.py", "+"), ("parts/deep/er.py", "+"), ("notes.md", "")])
def test_a_commit_is_marked_where_code_differs_from_it_in_any_folder(tmp_path, monkeypatch, changed, mark):
    (tmp_path / "parts/deep").mkdir(parents=True)
    for name in ("train.py", "parts/deep/er.py", "notes.md"):
        (tmp_path / name).write_text("x = 1\n")
    identity = ("-c", "user.name=x", "-c", "user.email=x@x")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "x")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    commit = runner.provenance()["commit"]
    assert commit and not commit.endswith("+")
    (tmp_path / changed).write_text("x = 2\n")
    assert runner.provenance()["commit"] == commit + mark


def test_a_source_of_r_that_can_not_be_is_an_error_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="--regime replay:"):
        runner.resolve_arm({"regime": f"replay:{tmp_path / 'none.jsonl'}"})


def test_runs_whose_rows_are_at_hand_are_not_made_again_unless_another_replays_them(tmp_path):
    arms = {"stage": {"lr": 1.0}, "static": {"lr": 1.0}, "permuted": {"lr": 1.0, "regime": "permuted:stage"}}
    runs = [(arm, seed) for arm in arms for seed in (0, 1)]

    def record(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def row(arm, seed, lr=1.0, **more):
        settings = {"lr": lr, "regime": arms[arm].get("regime", "slope")}
        return {"arm": arm, "seed": seed, "config": settings, **more}
    ended = {"final": {"exact": 0.5}}
    record(row("static", 0), row("static", 0, **ended), row("static", 1), row("stage", 0, **ended),
           row("stage", 1, **ended), row("permuted", 1, **ended))
    found = runner.recorded_runs(tmp_path, arms, [0, 1], runs)
    # static, seed 1, has no end; stage, seed 0, is replayed by a run that is still to be made.
    assert found == {("static", 0), ("stage", 1), ("permuted", 1)}
    record(row("stage", 0, r_changes=[[1, 0.0], [40, 0.5]], **ended))
    assert runner.recorded_runs(tmp_path, arms, [0, 1], runs) == {("stage", 0)}, "its rows hold its r"
    record(row("static", 0, lr=2.0, **ended))
    assert not runner.recorded_runs(tmp_path, arms, [0, 1], runs), "other settings"
    record(row("static", 0, **ended))
    runner.folder_of(tmp_path, "static", 0).mkdir(parents=True)
    assert not runner.recorded_runs(tmp_path, arms, [0, 1], runs), "its folder says more than its rows"


def test_a_run_that_is_taken_over_appears_whole_or_not_at_all_also_where_links_can_not_be_made(
        tmp_path, monkeypatch):
    """A copy that broke off must not count as finished the next time."""
    out, same = tmp_path / "e3", tmp_path / "e1" / "runs" / "stage-s0"
    same.mkdir(parents=True)
    for name in ("made.json", "checkpoint.pt", "scores.json"):
        (same / name).write_text(name)
    monkeypatch.setattr(runner, "find_finished_run", lambda *a: same)

    def other_disk(*a):
        raise OSError("Invalid cross-device link")
    monkeypatch.setattr(runner.os, "link", other_disk)
    with monkeypatch.context() as patch:
        def breaks(source, target):
            if source.endswith("scores.json"):
                raise KeyboardInterrupt
            shutil.copy(source, target)
        patch.setattr(runner, "_copy_or_link", breaks)
        with pytest.raises(KeyboardInterrupt):
            runner.run_arm(out, "slope", {}, 0, [0])
    path = runner.folder_of(out, "slope", 0)
    assert not path.exists()
    assert runner.run_arm(out, "slope", {}, 0, [0]) == path
    assert {file.name for file in path.iterdir()} == {"made.json", "checkpoint.pt", "scores.json"}


def test_final_scores_are_the_means_of_the_models_row(tmp_path):
    """Neither those of the real clips above it nor an end of an interval."""
    def row(name, exact, lsd):
        return {"row": name, "exact": exact, "lsd": {"mean": lsd, "interval": [lsd - 1, lsd + 1]}, "n": 9}
    rows = [row("real", 1.0, 0.5), row("model", 0.25, 2.5), row("codec ceiling", 0.75, 1.5)]
    (tmp_path / "scores.json").write_text(json.dumps({"x": {"protocol": {}, "rows": rows}}))
    assert runner._final_scores(tmp_path) == {"row": "model", "exact": 0.25, "lsd": 2.5, "n": 9}
