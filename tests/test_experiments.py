"""Claims about running experiments: continued, packed, taken over, with the user's own arms."""
import json
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process, training_alone
from fabricated import fabricated_rows, fabricated_run
from run_files import until

import evaluate
import train
from lab import experiments, runner
from lab.questions import EXPERIMENTS, Experiment
from lab.runner import folder_of
from parts import config
from parts.cache import cores
from parts.errors import Stopped, UserError

SMALL = ["--steps", "6", "--eval-every", "3", "--score-clips", "8", "--clips", "100"]
OWN = {"recipe": "static", "width": 32, "depth": 2, "heads": 2, "batch": 8, "channels": 16, "sample_steps": 3,
       "precision": "fp32", "workers": 0, "warmup": 4}
RECIPES = {name: {**OWN, "recipe": name} for name in ("vanilla", "static")}
NOT_COMPARED = ("seconds", "config", "commit", "threads")  # what differs between two machines or moments


@pytest.fixture
def small(monkeypatch):
    """E1 at the size of the tests; a number that only the weights decide stands for the judges."""
    def quality(run):
        return float(run.model.head.weight.abs().mean())

    def score(runs, clips, *positional, out, **named):
        rows = [{"row": "model", "exact": quality(runs[0])}]
        out.write_text(json.dumps({"x": {"protocol": {}, "rows": rows}}))

    monkeypatch.setitem(EXPERIMENTS, "E1", Experiment("small", RECIPES, "static"))
    monkeypatch.setattr(experiments, "estimate_hours", lambda options: 0.0)  # it measures for seconds
    training_alone(monkeypatch)
    monkeypatch.setattr(runner, "both_axes", lambda run, *more: {"event_accuracy": quality(run)})
    monkeypatch.setattr(runner, "final_axes", lambda run: {})
    monkeypatch.setattr(evaluate, "score", score)


@pytest.fixture
def trained(monkeypatch):
    """The settings that train.train was called with from here on."""
    calls = []
    right = train.train

    def counted(given, resume="", quick=None):
        calls.append(given)
        return right(given, resume, quick)

    monkeypatch.setattr(train, "train", counted)
    return calls


def run(*argv):
    sys.argv = ["lab/experiments.py", *map(str, argv)]
    experiments.main()


def all_rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def rows_of(out):
    """Rows without what differs between two machines or moments."""
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in all_rows(out)]


# --- interrupted, repeated, taken over

def test_an_experiment_continues_where_it_stopped_and_gives_the_same_rows(
        small, trained, tmp_path, monkeypatch, capsys):
    """Stopped inside its second run, continued: the rows of an uninterrupted one; what was finished is not
    run again."""
    whole, half = tmp_path / "elsewhere" / "whole", tmp_path / "half"
    run("run", "E1", "--seeds", 2, "--out", whole, *SMALL)
    preview = runner.both_axes
    trained.clear()

    def stopping_preview(*a):
        if len(trained) == 2:
            signal.raise_signal(signal.SIGTERM)
        return preview(*a)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "both_axes", stopping_preview)
        with pytest.raises(Stopped, match=r"^stopped at step \d in arm '\w+', seed \d; the same command con"):
            run("run", "E1", "--seeds", 2, "--out", half, *SMALL)
    trained.clear()
    run("run", "E1", "--seeds", 2, "--out", half, *SMALL)
    assert len(trained) == 3 and trained[0] == {}, "one continued, two run, one found finished"
    assert len(rows_of(whole)) == 8 and rows_of(whole) == rows_of(half)
    text = capsys.readouterr().out
    assert "DESCRIPTIVE" in text and "smallest p that 2 seeds can reach: 0.5" in text
    assert (half / "figure.png").exists()


@pytest.mark.parametrize("commit, settings, again", [
    ("abc", {}, 0),
    ("abc", {"lambda0": 0.25}, 1),
    ("abc+", {}, 1),
    ("", {}, 1),
])
def test_a_run_that_another_experiment_has_made_is_taken_over_and_never_one_of_other_code_or_settings(
        small, trained, tmp_path, monkeypatch, commit, settings, again):
    """The same settings at the same commit; code that is not committed, or is unknown, is not the same
    code."""
    made = {"commit": "abc"}
    monkeypatch.setattr(runner, "provenance", lambda *device: made)
    run("run", "E1", "--seeds", 1, "--only", "static", "--out", tmp_path / "a", *SMALL)
    made["commit"] = commit
    trained.clear()
    mine = json.dumps({**OWN, **settings})
    run("run", "E6", "--seeds", 1, "--only", "mine", "--arm", f"mine={mine}", "--out", tmp_path / "b", *SMALL)
    old, new = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len(trained) == again and len(new) == 2
    if not again:
        assert [row["event_accuracy"] for row in new] == [row["event_accuracy"] for row in old]
    with open(folder_of(tmp_path / "b", "mine", 0) / "log.jsonl", "a") as f:
        f.write("more\n")
    assert "more" not in (folder_of(tmp_path / "a", "static", 0) / "log.jsonl").read_text()


def test_the_table_is_made_again_from_the_rows_where_the_runs_are_gone(small, tmp_path):
    run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL)
    text, rows = (tmp_path / "table.txt").read_text(), (tmp_path / "rows.jsonl").read_text()
    shutil.rmtree(tmp_path / "runs")
    run("table", tmp_path)
    assert (tmp_path / "table.txt").read_text() == text and (tmp_path / "rows.jsonl").read_text() == rows
    last = json.loads(rows.splitlines()[-1])
    assert last["commit"] and last["torch"] and last["machine"] and last["threads"]
    assert last["config"]["recipe"] == "static"


def test_differences_from_another_arm_have_the_other_sign_and_nothing_is_written(tmp_path):
    folder = shutil.copytree(ROOT / "results/e1-sr-full", tmp_path / "e1")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = in_process(experiments, "table", folder, "--against", "clock", cwd=tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith("static "))
    recorded = json.loads((folder / "summary.json").read_text())
    clock = next(row for row in recorded if row["arm"] == "clock")["against"]
    low, high = clock["interval"]
    assert f"{-clock['difference']:+.3f} [{-high:+.3f}, {-low:+.3f}]" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    done = in_process(experiments, "table", folder, "--against", "soup", cwd=tmp_path)
    assert done.returncode == 2 and "--against soup: must be one of vanilla" in done.stderr


def test_a_folder_of_other_runs_is_refused_and_rows_of_arms_not_asked_for_stay(small, tmp_path):
    run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL)
    both = {("vanilla", 0), ("static", 0)}
    assert {(row["arm"], row["seed"]) for row in all_rows(tmp_path)} == both
    with pytest.raises(UserError, match="a run with steps 6, not 9"):
        run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL, "--steps", "9")
    run("run", "E1", "--seeds", 1, "--only", "static", "--out", tmp_path, *SMALL)
    assert {(row["arm"], row["seed"]) for row in all_rows(tmp_path)} == both
    shutil.rmtree(tmp_path / "runs")
    run("table", tmp_path)
    arms = json.loads((tmp_path / "experiment.json").read_text())["arms"]
    arms["static"]["lr"] = 1.0
    alone = {"static": arms["static"]}
    before = sorted((tmp_path / "rows.jsonl").read_text().splitlines())
    assert runner.collect(tmp_path, "E1", alone, [0]) == [], "rows made with other options are not this arm's"
    assert sorted((tmp_path / "rows.jsonl").read_text().splitlines()) == before, "nor deleted"


def test_an_experiment_goes_on_in_its_own_precision(small, tmp_path, monkeypatch):
    """It is written down with the arms; on a machine whose rule says otherwise the runs are not mixed."""
    arms = {name: {k: v for k, v in options.items() if k != "precision"} for name, options in RECIPES.items()}
    monkeypatch.setitem(EXPERIMENTS, "E1", Experiment("small", arms, "static"))
    monkeypatch.setattr(config, "pick_precision", lambda device: "fp32")
    run("run", "E1", "--seeds", 1, "--only", "static", "--out", tmp_path, *SMALL)
    assert {row["config"]["precision"] for row in all_rows(tmp_path)} == {"fp32"}
    monkeypatch.setattr(config, "pick_precision", lambda device: "bf16")
    with pytest.raises(UserError, match="precision fp32, not bf16"):
        run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL)
    run("run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL, "--precision", "fp32")
    assert {row["config"]["precision"] for row in all_rows(tmp_path)} == {"fp32"}


def test_an_experiment_that_is_stopped_before_its_first_step_names_the_arm_and_ends_with_status_130(
        small, tmp_path, monkeypatch):
    def stopped(*a):
        raise Stopped("stopped; continue with: python train.py --resume x")
    monkeypatch.setattr(runner, "run_arm", stopped)
    done = in_process(experiments, "run", "E1", "--seeds", 1, "--out", tmp_path, *SMALL, cwd=tmp_path)
    assert done.returncode == 130
    said = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert said == "stopped in arm 'vanilla', seed 0; the same command continues"


# --- several at a time

def status(stat):
    """/proc/PID/stat -> [state, parent, ...]; [] where the process is gone."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_packed_runs_killed_with_their_parent_continue_to_the_rows_of_a_serial_experiment(
        tmp_path, monkeypatch):
    """kill -9 of the parent while both of its workers train: they save and end by themselves; the same
    command goes on."""
    argv = ["run", "E1", "--only", "a", "b", "--seeds", "1", "--steps", "60", "--eval-every", "30",
            "--score-clips", "8", "--clips", "100"]
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        argv += ["--arm", f"{name}=" + json.dumps({**OWN, "lr": lr})]
    packed = [*argv, "--jobs", "2", "--out", str(tmp_path / "packed")]
    threads = torch.get_num_threads()
    # No row depends on these.
    monkeypatch.setattr(train, "draw_pages", lambda *a: None)
    monkeypatch.setattr(train, "write_moment", lambda *a: None)
    monkeypatch.setattr(experiments, "estimate_hours", lambda options: 0.0)
    try:
        torch.set_num_threads(max(1, cores() // 2))
        run(*argv, "--out", tmp_path / "elsewhere" / "serial")
    finally:
        torch.set_num_threads(threads)

    # The first attempt, killed once a worker has evaluated.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    parent = subprocess.Popen([sys.executable, "-m", "lab.experiments", *packed], cwd=tmp_path,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = [folder_of(tmp_path / "packed", arm, 0) / "log.jsonl" for arm in "ab"]
    until(lambda: any(log.is_file() and '"eval"' in log.read_text() for log in logs))
    stats = Path("/proc").glob("[0-9]*/stat")
    workers = [stat.parent for stat in stats if status(stat)[1:2] == [str(parent.pid)]]
    parent.kill()
    parent.wait()
    assert len(workers) >= 2
    until(lambda: all(status(worker / "stat")[:1] in ([], ["Z"]) for worker in workers))
    assert not any((log.parent / "scores.json").exists() for log in logs), "killed too late to prove anything"

    run(*packed)
    serial = rows_of(tmp_path / "elsewhere" / "serial")
    assert len(serial) == 4 and serial == rows_of(tmp_path / "packed")
    own_lines = logs[0].parent.with_name("a-s0.txt").read_text()
    assert "trained 60 steps" in own_lines, "each run's own lines are beside it"


@pytest.fixture
def fabricated(small, monkeypatch):
    """Runs that are finished without training, each said in made.txt."""
    def run_arm(out, arm, options, seed, seeds):
        with open(out / "made.txt", "a") as f:
            f.write(f"{arm} {seed}\n")
        return fabricated_run(out, arm, options, seed, seeds)

    monkeypatch.setattr(runner, "run_arm", run_arm)
    monkeypatch.setattr(experiments, "learning_figure", lambda *a: None)


@pytest.mark.parametrize("jobs", ["2", "1"])
def test_the_parent_of_packed_runs_on_a_gpu_never_touches_it(
        fabricated, tmp_path, monkeypatch, capsys, jobs):
    """Whatever initialises CUDA raises, but in a worker. Negative control: one run at a time is made here."""
    in_worker = []

    def touch(*a, **k):
        if not in_worker:
            raise ValueError("the parent touched the GPU")
        return True

    def workers(fn, jobs, args=(), workers=None, ahead=2, apart=False):
        for job in jobs:
            in_worker.extend([job] * bool(apart and workers))
            made = fn(job, *args)
            in_worker.clear()
            yield job, made

    def run_arm(*a):
        touch()
        return fabricated_run(*a)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: touch() and (9, 0))
    for name in ("_lazy_init", "get_device_name", "synchronize", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, touch)
    monkeypatch.setattr(experiments, "parallel_map", workers)
    monkeypatch.setattr(experiments, "estimate_hours", lambda options: float(touch()))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(runner, "run_arm", run_arm)
    arms = {name: {k: v for k, v in options.items() if k != "precision"} for name, options in RECIPES.items()}
    monkeypatch.setitem(EXPERIMENTS, "E1", Experiment("small", arms, "static"))
    argv = ["run", "E1", "--device", "cuda", "--seeds", "2", "--jobs", jobs, "--out", tmp_path]
    if jobs == "1":
        with pytest.raises(SystemExit):
            run(*argv)
        assert "FAILED vanilla, seed 0: ValueError: the parent touched the GPU" in capsys.readouterr().out
        return
    run(*argv)
    rows = all_rows(tmp_path)
    assert {row["config"]["precision"] for row in rows} == {"bf16"} and len(rows) == 12


@pytest.mark.parametrize("width, at_a_time", [(128, 4), (129, 1)])
def test_several_runs_share_a_gpu_by_default_where_they_are_small(width, at_a_time):
    args = types.SimpleNamespace(jobs=0)
    for device, expected in (("cuda", at_a_time), ("cpu", 1)):
        cfg = config.Config(device=device, width=width)
        assert experiments._runs_at_a_time(args, {"x": config.Config(device=device), "y": cfg}) == expected
    args.jobs = 3
    assert experiments._runs_at_a_time(args, {"y": cfg}) == 3


# --- shards

SHARD = """
import sys, time
from pathlib import Path
from fabricated import fabricated_run
from lab import experiments, runner

def run_arm(out, arm, *more):
    time.sleep(0.02)
    with open(out / "made.txt", "a") as f:
        f.write(f"{arm} {more[1]}\\n")
    return fabricated_run(out, arm, *more)

runner.run_arm = run_arm
experiments.estimate_hours = lambda options: 0.0
experiments.learning_figure = lambda *a: None
experiments.main()
for _ in range(5):
    experiments.show(Path(sys.argv[-1]))
"""


def test_two_processes_that_share_an_experiment_fill_one_folder_as_one_process_would(
        fabricated, tmp_path, monkeypatch):
    """Real processes at the same time, both writing tables again and again; each run is made once."""
    argv = ["run", "E3", "--seeds", "3", "--device", "cpu"]
    shared, alone = tmp_path / "shared", tmp_path / "elsewhere" / "alone"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    both = []
    for shard in ("1/2", "2/2"):
        command = [sys.executable, "-c", SHARD, *argv, "--shard", shard, "--out", str(shared)]
        both.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    run(*argv, "--out", alone)
    for process in both:
        text = process.communicate(timeout=200)[0]
        assert process.returncode == 0, text[-800:]
    made = [sorted((out / "made.txt").read_text().splitlines()) for out in (shared, alone)]
    assert len(made[0]) == 27 and made[0] == made[1]
    assert rows_of(shared) == rows_of(alone) and len(rows_of(shared)) == 81
    for name in ("table.txt", "summary.json", "experiment.json"):
        assert (shared / name).read_text() == (alone / name).read_text(), name


def test_shards_that_were_asked_for_different_things_are_refused_and_more_seeds_are_added(
        fabricated, tmp_path, capsys):
    argv = ["run", "E1", "--out", tmp_path, "--shard"]
    run(*argv, "1/2", "--seeds", "1", *SMALL)
    shutil.rmtree(tmp_path / "runs")  # as if none of them had begun
    rows = (tmp_path / "rows.jsonl").rename(tmp_path / "kept.jsonl")
    with pytest.raises(UserError, match="holds arm 'vanilla' with steps 6, not 9"):
        run(*argv, "2/2", "--seeds", "1", *SMALL, "--steps", "9")
    with pytest.raises(UserError, match="holds experiment E1"):
        run("run", "E6", *argv[2:], "2/2", *SMALL)
    rows.rename(tmp_path / "rows.jsonl")
    run(*argv, "2/2", "--first-seed", "1", "--seeds", "2", *SMALL)
    assert {(row["arm"], row["seed"]) for row in all_rows(tmp_path)} == {
        (arm, seed) for arm in ("vanilla", "static") for seed in (0, 2)}
    assert json.loads((tmp_path / "experiment.json").read_text())["seeds"] == [0, 1, 2]
    capsys.readouterr()
    run(*argv, "9/9", "--seeds", "1", *SMALL)
    assert "no run is left to this shard" in capsys.readouterr().out


def test_recorded_rows_of_other_settings_are_refused_and_left_as_they_are(fabricated, tmp_path):
    """As results/e1 is without its run folders, where somebody types the experiment's name alone."""
    argv = ["run", "E1", "--out", tmp_path, "--seeds", "1", *SMALL]
    run(*argv)
    shutil.rmtree(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(UserError, match="rows.jsonl: holds arm 'vanilla', seed 0, with steps 6, not 9"):
        run(*argv, "--steps", "9")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    run(*argv)  # the same settings: nothing is left to do
    assert not (tmp_path / "runs").exists()


def test_arms_that_are_run_one_by_one_have_the_order_and_the_reference_of_their_experiment(
        fabricated, tmp_path):
    mine = ["--arm", f"mine={json.dumps(RECIPES['vanilla'])}"]
    for only in (["mine", *mine], ["static"], ["vanilla"]):
        run("run", "E1", "--out", tmp_path, "--shard", "1/1", "--seeds", "1", *SMALL, "--only", *only)
    spec = json.loads((tmp_path / "experiment.json").read_text())
    assert spec["reference"] == "static" and list(spec["arms"]) == ["vanilla", "static", "mine"]


# --- arms

def test_your_own_arm_joins_the_table_and_a_failing_one_costs_nothing_else(
        small, tmp_path, capsys, monkeypatch):
    (tmp_path / "arms.json").write_text(json.dumps({"from a file": {**OWN, "lr": 1e-3}}))
    right = train.train

    def fails(given, resume="", quick=None):
        if given.get("recipe") == "vanilla":
            raise RuntimeError("out of luck")
        return right(given, resume, quick)

    monkeypatch.setattr(train, "train", fails)
    out = tmp_path / "x"
    with pytest.raises(SystemExit) as stop:
        run("run", "E1", "--seeds", 1, "--out", out, "--arm", f"mine={json.dumps(OWN)}",
            "--arms", tmp_path / "arms.json", *SMALL)
    assert stop.value.code == 1
    assert "FAILED vanilla, seed 0: RuntimeError: out of luck" in capsys.readouterr().out
    lines = (out / "table.txt").read_text().splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in ("mine", "from a file", "static"))
    assert "vanilla                    0   no finished run" in lines
    mine = next(row for row in json.loads((out / "summary.json").read_text()) if row["arm"] == "mine")
    ratio = next(iter(mine["sooner"].values()))["step"]["ratio"]
    assert mine["against"]["difference"] == 0, "the same options as the reference"
    assert ratio == 1.0 or np.isnan(ratio)


def test_the_clocks_of_e7_are_chosen_by_setting_on_seeds_that_the_table_does_not_use(tmp_path):
    arms = EXPERIMENTS["E7"].arms
    home, away = "home", "batch 16"
    best = {f"{home}: clock to 0.5 K": 0.9, f"{away}: clock to 2 K": 0.8}
    rows = fabricated_rows(arms, [0, 1], lambda arm, seed: best.get(arm, 0.5))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    developed = {arm: {**options, "score_split": "val"} for arm, options in arms.items()}
    spec = {"experiment": "E7", "arms": developed, "seeds": [0, 1], "reference": "stage", "pilot": False}
    (tmp_path / "experiment.json").write_text(json.dumps(spec))
    chosen = experiments.tuned_clocks(arms, tmp_path, [2, 3])
    assert [arm for arm in chosen if arm.startswith(home)] == [
        f"{home}: stage", f"{home}: static", f"{home}: clock to 0.5 K (frozen, re-tuned)"]
    assert [arm for arm in chosen if arm.startswith(away)] == [
        f"{away}: stage", f"{away}: static",
        f"{away}: clock to 0.5 K (frozen)", f"{away}: clock to 2 K (re-tuned)"]
    retuned = chosen[f"{away}: clock to 2 K (re-tuned)"]
    assert retuned == {"batch": 16, "recipe": "stage", "regime": "ramp:2"}

    # In super-resolution, whose energy score is better where it is lower, the same clocks are the lowest.
    lower = fabricated_rows(arms, [0, 1], lambda arm, seed: -best.get(arm, 0.5))
    for row in (row for row in lower if "final" in row):
        row["final"] = {"energy_score": row["final"]["exact"]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lower))
    assert experiments.tuned_clocks(arms, tmp_path, [2, 3]) == chosen
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # A development run of two settings asks for two settings.
    some = {arm: options for arm, options in developed.items() if arm.startswith((home, away))}
    (tmp_path / "experiment.json").write_text(json.dumps({**spec, "arms": some}))
    of_two = {arm: options for arm, options in chosen.items() if arm.startswith((home, away))}
    assert experiments.tuned_clocks(arms, tmp_path, [2, 3]) == of_two
    with pytest.raises(UserError, match="chosen on seed 1 too.*--first-seed 2"):
        experiments.tuned_clocks(arms, tmp_path, [1, 2])
    (tmp_path / "experiment.json").write_text(json.dumps({**spec, "arms": arms}))
    with pytest.raises(UserError, match="chosen on test clips"):
        experiments.tuned_clocks(arms, tmp_path, [2, 3])


# --- the command line

def test_a_dry_run_tells_arms_and_hours_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "lab.experiments", "run", "E1", "--dry-run", "--seeds", "3",
               "--steps", "400", "--arm", 'longer={"recipe": "static", "steps": 800}',
               "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 arms x 3 seeds, 400 steps" in done.stdout and "hours" in done.stdout
    assert '"steps": 800' in done.stdout, "what an arm has otherwise"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, message", [
    (("run", "E99"), "invalid choice: 'E99'"),
    (("run", "E1", "--arm", "mine"), "must be NAME={...}"),
    (("run", "E1", "--arm", 'mine={"lambda9": 1}'), "train.py has no option 'lambda9'"),
    (("run", "E1", "--arm", 'mine={"batch": 0}'), "--batch 0: must be from 1 to 65536"),
    (("run", "E1", "--arm", 'mine={"regime": "replay:none.jsonl"}'), "--regime replay:none.jsonl"),
    (("run", "E1", "--only", "soup"), "no such arm"),
    (("run", "E1", "--seeds", "0"), "--seeds 0: must be a whole number of at least 1"),
    (("run", "E1", "--arms", "none.json"), "none.json: not a JSON file"),
    (("run", "E1", "--arms", ""), "--arms : not a JSON file"),
    (("run", "E1", "--out", ""), "--out empty: must be a folder"),
    (("run", "E1", "--dry-run", "--data", "none"), "arm 'vanilla': --data none: no such folder"),
    (("run", "E1", "--arm", "deep=" + 9_999 * "["), "must be NAME={...}"),
    (("run", "E1", "--shard", "0/4"), "--shard 0/4: must be K/N, the K-th of N shards, such as 2/8"),
    (("run", "E1", "--shard", "5/4"), "--shard 5/4: must be K/N"),
    (("run", "E1", "--shard", "two"), "--shard two: must be K/N"),
    (("run", "E1", "--shard", "1/-2"), "--shard 1/-2: must be K/N"),
    (("table", "."), "no experiment.json"),
    (("run", "E1", "--tuned", "x"), "--tuned belongs to E7"),
    (("run", "E7", "--tuned", "x"), "--tuned x: no experiment.json"),
])
def test_bad_input_ends_with_status_2_and_one_line(tmp_path, argv, message):
    done = in_process(experiments, *argv, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_where_the_reference_is_left_out_the_first_arm_stands_in_within_each_setting():
    both = dict.fromkeys(("home: clock", "home: clock 2", "away: clock", "away: clock 2"), {})
    assert experiments._reference("E7", both) == "clock"
    assert experiments._reference("E7", {"home: clock": {}, "home: clock 2": {}}) == "home: clock"
    assert experiments._reference("E1", {"stage": {}, "vanilla": {}}) == "stage"
    assert experiments._reference("E7", {**both, "home: stage": {}}) == "stage"


# --- what is refused before anything is run

def test_an_own_arm_with_a_setting_that_changes_nothing_is_refused(small, tmp_path):
    """Negative control: with the mechanism that it belongs to it is planned."""
    def planned(arm: str):
        return in_process(experiments, "run", "E1", "--seeds", 1, "--dry-run", "--only", "static", *SMALL,
                          "--arm", arm, cwd=tmp_path)
    done = planned('mine={"m": 1.0}')
    assert done.returncode == 2 and "arm 'mine': --m 1.0: changes nothing here; it needs" in done.stderr
    assert planned('mine={"m": 1.0, "timesteps": "constant"}').returncode == 0
    assert planned('mine={"regime": "ramp:0.5"}').returncode == 0


def test_an_arm_that_replays_one_that_is_left_out_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "estimate_hours", lambda options: 0.0)  # it measures for seconds

    def planned(*only):
        return in_process(experiments, "run", "E1", "--seeds", 1, "--dry-run", "--out", tmp_path, *SMALL,
                          "--only", *only, cwd=tmp_path)
    done = planned("permuted")
    assert done.returncode == 2 and "arm 'permuted' replays the r of arm 'stage'" in done.stderr
    assert planned("permuted", "stage").returncode == 0


def test_without_a_run_of_its_reference_a_table_takes_the_first_arm_that_has_one(small, tmp_path):
    done = in_process(experiments, "run", "E1", "--seeds", 1, "--out", tmp_path / "e", *SMALL, "--only",
                      "vanilla", "static", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "e" / "table.txt").read_text()
    assert "has finished: differences are from" not in text and "differences from 'static'" in text
    shutil.rmtree(tmp_path / "e" / "runs" / "static-s0")
    rows = [row for row in all_rows(tmp_path / "e") if row["arm"] != "static"]
    (tmp_path / "e" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = in_process(experiments, "table", tmp_path / "e", cwd=tmp_path)
    assert "no run of 'static' has finished: differences are from 'vanilla'" in done.stdout

