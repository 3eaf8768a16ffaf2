"""Claims about checking a device: each part alone, in a table that says what failed."""
import json
import subprocess
import sys
import types
import warnings

import pytest
import torch
from conftest import ROOT, TINY, in_process

import train
from lab import check_device
from lab.check_device import PARTS, Check, Waits, run_part
from parts.errors import UserError
from parts.files import write_text

OPTIONS = {name: value for name, value in TINY.items() if name not in ("device", "steps")}


@pytest.fixture
def ask(tmp_path, bare, monkeypatch):
    """A check of the CPU at the size of the tests."""
    monkeypatch.setattr(check_device.benchmark, "matmul_rate", lambda device, dtype: 1e9)
    return Check("cpu", "smoke", 12, OPTIONS, tmp_path)


# --- parts

def test_training_parts_say_how_fast_a_step_is_and_what_share_of_the_device_it_takes(ask):
    found = PARTS["accumulate"][0](ask)
    cfg = json.loads((ask.out / "accumulate" / "config.json").read_text())
    asked = {"accumulate": 4, "checkpointing": True, "structure": "constant", "guidance": "constant"}
    assert asked.items() <= cfg.items()
    assert found["step_ms"] > 0 and found["waits"] is None
    # FLOP of a step are counted, and a product reaches 1e9 a second here.
    flop = check_device.count_step(check_device.Config(**cfg), clips=4).flop
    assert flop > 1e8 and found["share"] == pytest.approx(flop / (found["step_ms"] / 1e3) / 1e9)


def test_a_part_whose_steps_are_skipped_has_failed(ask, monkeypatch):
    right = train.losses

    def broken(*a, **k):
        found = right(*a, **k)
        return {**found, "total": found["total"] * float("nan")}

    monkeypatch.setattr(train, "losses", broken)
    with pytest.raises(UserError, match="1 of 1 steps had no finite gradient, the first is 1"):
        PARTS["accumulate"][0](ask)


def test_a_resumed_run_is_the_longer_run_in_every_bit_on_a_cpu(ask):
    assert PARTS["resume"][0](ask)["off"] == 0


@pytest.mark.parametrize("resumed, again, passes", [
    (1.0, None, True), (1.2, 1.1, True), (1.5, 1.1, False), (1.5, 1.0, False), (float("nan"), 1.0, False)])
def test_a_resumed_run_may_differ_no_more_than_the_same_run_made_again(
        ask, monkeypatch, resumed, again, passes):
    """Without training: one weight of each of the three runs, the first has 1."""
    weights = {"whole": 1.0, "resumed": resumed, "again": again}
    made = []

    def fake(given, run=""):
        made.append(run)
        return ask.out / given.get("out", run)

    monkeypatch.setattr(train, "train", fake)
    monkeypatch.setattr(check_device, "load_checkpoint",
                        lambda folder: ({}, {"model": {"w": torch.tensor([weights[folder.name]])}}))
    if passes:
        assert PARTS["resume"][0](ask)["off"] == pytest.approx(resumed - 1)
    else:
        with pytest.raises(UserError, match="a resumed run is off by .*, the same run again by"):
            PARTS["resume"][0](ask)
    assert made == ["", "", str(ask.out / "resumed")] + [""] * (resumed != 1), "again only where it is needed"


def test_sounds_are_made_by_the_runs_of_the_training_parts(ask, t2a_run, sr_run):
    """Also written, without an audio library. Negative controls: silence; no such run."""
    for name, run in (("t2a", t2a_run), ("sr", sr_run)):
        (ask.out / name).symlink_to(run)
    assert "a clip in" in PARTS["generate"][0](ask)["note"]
    assert "3.1 s of sound in" in PARTS["upsample"][0](ask)["note"]
    assert (ask.out / "generated.wav").stat().st_size > 40_960
    with pytest.raises(UserError, match="or silence"):
        check_device._check_sound(torch.zeros(9).numpy(), 9)
    (ask.out / "t2a").unlink()
    with pytest.raises(UserError, match="not a run folder"):
        PARTS["generate"][0](ask)


def test_the_machine_is_described_with_what_it_lacks(ask, monkeypatch):
    monkeypatch.setattr(check_device, "PACKAGES", ("torch", "no-such-package"))
    found = PARTS["machine"][0](ask)
    assert found["packages"]["torch"] and found["note"].endswith("TFLOP/s; without no-such-package")


# --- waits

def steps_that_wait(numbers, monkeypatch):
    """Of a training whose k-th step waits numbers[k] times for a GPU: Waits, when it is over."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(train, "update", lambda *a: "norm")
    with Waits("cuda") as waits:
        for n in numbers:
            for _ in range(n):
                warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
            assert train.update(None, None, 1) == "norm"
    assert modes == ["warn", "default"]
    return waits


def test_the_waits_of_a_plain_step_are_counted_with_their_lines(monkeypatch, recwarn):
    waits = steps_that_wait([9, 1, 1, 2, 1, 30, 1], monkeypatch)
    (place, n), = waits.of_a_step().items()
    assert n == 1 and place.startswith("test_check_device.py:")
    assert [places.total() for places in waits.steps] == [9, 1, 1, 2, 1, 30, 1]
    assert steps_that_wait([3, 2, 4], monkeypatch).of_a_step().total() == 3
    assert Waits("cpu").of_a_step() is None


def test_more_than_one_wait_in_a_plain_step_fails_and_without_a_gpu_the_part_is_left_out(ask, monkeypatch):
    assert PARTS["waits"][0](ask) == {"left_out": "there is nothing to wait for on cpu"}
    found = {"waits": 1, "waits_at": {"train.py:7": 1}}
    monkeypatch.setattr(check_device, "_train", lambda *a, **k: found)
    ask.device = "cuda"
    assert PARTS["waits"][0](ask)["note"] == "train.py:7 x 1"
    found.update(waits=3, waits_at={"train.py:7": 1, "data.py:8": 2})
    with pytest.raises(UserError, match="a plain step waits 3 times: train.py:7 x 1, data.py:8 x 2"):
        PARTS["waits"][0](ask)


# --- each in a process of its own

def script(text):
    return [sys.executable, "-c", text]


@pytest.mark.parametrize("command, limit_s, note", [
    (script("print('so far'); raise ValueError('out of luck')"), 20, "ValueError: out of luck"),
    (script("import sys; print('a bar\\rerror: no room', file=sys.stderr); sys.exit(2)"), 20,
     "error: no room"),
    (script("import os; os.kill(os.getpid(), 9)"), 20, "ended with status -9"),
    (script("import time; time.sleep(60)"), 0.3, "took longer than 0 s"),
    (script("print('done, but nothing found')"), 20, "done, but nothing found"),
])
def test_a_part_that_breaks_dies_hangs_or_finds_nothing_has_failed_with_its_last_words(
        tmp_path, command, limit_s, note):
    row = run_part("x", command, limit_s, tmp_path)
    assert row["passed"] is False and row["note"] == note


def test_a_part_that_failed_stops_no_other_and_the_command_says_which(tmp_path, monkeypatch):
    """The whole command, with scripts in the place of parts."""
    def command_of(name, ask):
        if name == "sr":
            return script("raise RuntimeError('Expected all tensors to be on the same device')")
        found = {"step_ms": 30.0, "waits": 1, "share": 0.25, "memory_mb": 2_900.0, "note": "fine"}
        if name == "waits":
            found = {"left_out": "no GPU"}
        return script(f"open({str(ask.out / f'{name}.json')!r}, 'w').write({json.dumps(found)!r})")

    monkeypatch.setattr(check_device, "command_of", command_of)
    out = tmp_path / "x"
    argv = ("--device", "cpu", "--only", "waits", "sr", "bench", "--out", out)
    done = in_process(check_device, *argv, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["sr", "waits", "bench"], "in the order of the parts"
    assert "FAILED" in lines[1] and lines[1].endswith("Expected all tensors to be on the same device")
    assert "left out" in lines[2] and lines[2].endswith("no GPU")
    cells = lines[3].split()
    assert cells[:2] == ["bench", "passed"] and cells[3:] == ["30.0", "1", "25%", "2900", "fine"]
    assert "failed: sr" in lines[-1]
    rows = json.loads((out / "check.json").read_text())["rows"]
    assert [row["passed"] for row in rows] == [False, None, True] and rows[2]["share"] == 0.25

    # Negative controls: without the one that fails all is well; a used folder is refused.
    done = in_process(check_device, *argv[:3], "waits", "bench", "--out", tmp_path / "y", cwd=tmp_path)
    assert done.returncode == 0 and "failed:" not in done.stdout
    done = in_process(check_device, *argv, cwd=tmp_path)
    assert done.returncode == 2 and "is not an empty folder" in done.stderr


def test_no_part_begins_after_the_minutes_are_over_and_each_has_its_limit(ask, monkeypatch):
    clock, limits = types.SimpleNamespace(now=0.0), []
    monkeypatch.setattr(check_device.time, "perf_counter", lambda: clock.now)

    def slow(name, command, limit_s, out):
        limits.append(limit_s)
        clock.now += 55.0
        return {"part": name, "passed": True, "seconds": 55.0, "note": ""}

    monkeypatch.setattr(check_device, "run_part", slow)
    rows = check_device.check(ask, ["machine", "t2a", "sr", "bench"], minutes=2)
    assert limits == [60, 65, 10]
    assert [row["passed"] for row in rows] == [True, True, True, False]
    assert rows[3]["note"] == "the 2 minutes were over; --minutes gives more"


def test_a_part_is_called_for_in_its_own_process_with_all_that_was_asked(ask, monkeypatch):
    seen = []
    monkeypatch.setattr(check_device, "do_part", lambda name, ask: seen.append((name, ask)))
    command = check_device.command_of("upsample", ask)
    assert command[1:3] == ["-m", "lab.check_device"]
    write_text(ask.out / "not-empty", "")
    done = in_process(check_device, *command[3:], cwd=ask.out)
    assert done.returncode == 0, done.stderr
    assert seen == [("upsample", ask)]


@pytest.mark.parametrize("argv, message", [
    (("--only", "soup"), "invalid choice: 'soup'"),
    (("--device", "abacus"), "--device abacus: not here"),
    (("--options", "{"), "must be settings of train.py as JSON"),
    (("--options", "[]"), "must be an object"),
    (("--options", '{"wdith": 8}'), "'wdith' is none of train.py's settings"),
    (("--options", '{"steps": 8}'), "'steps' is none of train.py's settings, or has a flag here"),
    (("--options", '{"batch": 0}'), "--batch 0: must be from 1 to 65536"),
    (("--options", '{"width": "x"}'), "--width is 'x', not of type int"),
    (("--options", '{"guidance": "on"}'), "--guidance is 'on', not one of off, constant, adaptive"),
])
def test_bad_input_ends_with_status_2_and_one_line(tmp_path, argv, message):
    done = in_process(check_device, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_check_of_a_device_passes_on_this_one(tmp_path):
    """Real processes, on the CPU at the size of the tests."""
    command = [sys.executable, "-m", "lab.check_device", "--device", "cpu", "--steps", "10", "--minutes", "9",
               "--only", "machine", "t2a", "accumulate", "resume", "generate", "waits", "--out",
               str(tmp_path / "x"), "--options", json.dumps(OPTIONS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-800:]
    rows = json.loads((tmp_path / "x" / "check.json").read_text())["rows"]
    assert [row["passed"] for row in rows] == [True] * 5 + [None]
    assert rows[1]["share"] > 0 and rows[1]["step_ms"] > 0 and rows[3]["off"] == 0
