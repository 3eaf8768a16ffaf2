"""Claims about the machine: devices, several processes, stopping, time and memory."""
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from run_files import distance, final, log_of, until

import train
from parts import devices, runs
from parts.config import Config, save_config
from parts.devices import StopSignal, Timer
from parts.errors import UserError


def flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def torchrun(out, settings):
    """`python train.py` in two processes. After --, torchrun takes none of its flags for its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--", ROOT / "train.py",
               *flags({name: value for name, value in settings.items() if name != "variants"}), "--out", out]
    return subprocess.Popen(command, env=env, cwd=out.parent, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


# --- several processes

def test_two_processes_with_half_the_batch_each_are_one_process_with_all_of_it(tiny, tmp_path, bare):
    """gloo, mechanisms off, but for a density of timesteps that follows the loss of all clips, from step
    21 on: the same parameters and observations to float32 tolerance, one log, one voice. Negative control:
    half the batch alone."""
    settings = {**tiny, "task": "t2a", "recipe": "vanilla", "timesteps": "infonoise", "m": 0.0, "s": 2.0,
                "probe": "never", "steps": 24, "eval_every": 24, "score_clips": 2}
    job = torchrun(tmp_path / "two", settings)
    one = train.train({**settings, "out": str(tmp_path / "one")})
    text = job.communicate(timeout=400)[0]
    assert job.returncode == 0, text[-2000:]
    assert distance(final(tmp_path / "two")["model"], final(one)["model"]) < 1e-3
    assert text.count("trained 24 steps") == 1 and "on 2 x cpu" in text
    (losses, drawn), (losses_of_one, drawn_of_one) = (final(path)["infonoise"]["sums"]
                                                      for path in (tmp_path / "two", one))
    assert torch.equal(drawn, drawn_of_one) and torch.allclose(losses, losses_of_one, rtol=1e-3)
    shares = [final(path)["infonoise"]["shares"] for path in (tmp_path / "two", one)]
    assert len(shares[1]) == 20 and np.allclose(*shares, rtol=1e-3)
    steps = [[row["step"] for row in log_of(tmp_path / name)] for name in ("two", "one")]
    assert steps[0] == steps[1]
    logged = [[(row["loss"], row["t_drawn"]) for row in log_of(tmp_path / name) if "loss" in row]
              for name in ("two", "one")]
    assert np.allclose(*logged, rtol=1e-3), "the log is of the rows of all processes"
    half = train.train({**settings, "batch": tiny["batch"] // 2, "out": str(tmp_path / "half")})
    assert distance(final(half)["model"], final(one)["model"]) > 1e-2
    assert not torch.allclose(final(half)["infonoise"]["sums"][1], drawn_of_one, rtol=0.1)


def is_process_1(environ: Path, folder: Path) -> bool:
    """Is this /proc/N/environ that of process 1 of a job that writes to `folder`?"""
    try:
        command = (environ.parent / "cmdline").read_bytes()
        return b"\0RANK=1\0" in b"\0" + environ.read_bytes() and str(folder).encode() in command
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_process_that_dies_ends_the_job_with_one_line_and_a_run_that_goes_on(tiny, tmp_path):
    settings = {**tiny, "task": "t2a", "recipe": "stage", "steps": 4_000, "eval_every": 20, "score_clips": 2,
                "width": 64}
    run = tmp_path / "run"
    job = torchrun(run, settings)
    try:
        until(lambda: (run / "checkpoint.pt").is_file(), 300)
        victims = [int(environ.parent.name) for environ in Path("/proc").glob("[0-9]*/environ")
                   if is_process_1(environ, tmp_path)]
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
        text = job.communicate(timeout=200)[0]
    finally:
        job.kill()
    assert job.returncode != 0 and "lost the others" in text and "--resume" in text, text
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 20 and step % 20 == 0
    cfg, checkpoint = runs.open_settings({}, str(run))
    assert checkpoint["step"] == step and cfg.steps == 4_000


@pytest.mark.parametrize("more, refused", [({}, False), ({"structure": "constant"}, True),
                                           ({"teacher": "shuffled", "guidance": "constant"}, True),
                                           ({"structure": "constant", "batch": 4}, False)])
def test_each_process_has_clips_to_compare(tiny, tmp_path, monkeypatch, more, refused):
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setattr(runs, "join_processes", lambda device: device)
    monkeypatch.setattr(runs, "broadcast_from_rank0", lambda x: x)
    given = {**tiny, "recipe": "vanilla", "batch": 2, "out": str(tmp_path / "run"), **more}
    with pytest.raises(UserError, match="--batch 2: must be more than 2 processes x 1 parts") if refused \
            else contextlib.nullcontext():
        runs.open_settings(given, "")


def test_a_run_that_goes_on_in_several_processes_keeps_its_device_and_one_says_what_is_wrong(
        tmp_path, monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setattr(runs, "join_processes", lambda device: asked.append(device) or device)
    monkeypatch.setattr(runs, "broadcast_from_rank0", lambda outcome: said.append(outcome) or outcome)
    monkeypatch.setattr(runs, "pick_device", lambda name: {"auto": "cuda"}.get(name, name))
    with pytest.raises(UserError, match="not a run folder"):
        runs.open_settings({}, str(tmp_path / "none"))
    assert asked == ["cuda"] and isinstance(said[0], UserError), "all met before one of them spoke"
    save_config(tmp_path, Config(device="cpu", out=str(tmp_path)))
    cfg, _ = runs.open_settings({}, str(tmp_path))
    assert asked[1] == cfg.device == "cpu"
    runs.open_settings({"device": "cuda"}, str(tmp_path))
    assert asked[2] == "cuda", "what was typed holds"


def test_one_process_is_a_job_of_its_own():
    assert (devices.RANK, devices.WORLD) == (0, 1)
    assert devices.join_processes("cpu") == "cpu"
    value = {"any": [1, None]}
    assert devices.broadcast_from_rank0(value) is value
    x = torch.arange(6.0)
    assert devices.from_all(x) is x
    devices.leave_processes()


def test_the_end_of_another_process_is_one_line_and_any_other_error_stays_what_it_is(monkeypatch, capsys):
    def fail():
        raise RuntimeError("connection closed by peer\nand a page of details")

    with pytest.raises(RuntimeError, match="closed by peer"):
        devices.run_on_all(fail)
    monkeypatch.setattr(devices, "WORLD", 2)
    with pytest.raises(SystemExit) as end:
        devices.run_on_all(fail)
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1
    assert "process 0 lost the others (connection closed by peer)" in err and "--resume RUN" in err


# --- stopping

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_loop_between_two_steps_and_not_in_the_middle(number):
    before, steps = signal.getsignal(number), 0
    with StopSignal() as stop:
        while not stop.now and steps < 10:
            if steps == 3:
                signal.raise_signal(number)
            steps += 1
    assert steps == 4 and stop.now
    assert signal.getsignal(number) is before, "afterwards it means what it meant before"


def test_of_several_processes_the_first_decides_whether_all_stop(monkeypatch):
    monkeypatch.setattr(devices, "WORLD", 2)
    for decided in (False, True):
        monkeypatch.setattr(devices, "broadcast_from_rank0", lambda x, decided=decided: decided)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked and not stop.now
            stop.agree()
            assert stop.now == decided


# --- device

def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    assert devices.pick_device("cpu") == "cpu" and devices.pick_device("auto") in ("cuda", "mps", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.pick_device("auto") == "cpu"
    for name in ("cuda", "cuda:0", "mps", "abacus"):
        with pytest.raises(UserError, match=f"--device {name}: not here; available: cpu$"):
            devices.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.pick_device("auto") == "cuda"


class Clock:
    """A stand-in for the module `time`, whose seconds pass when the test says so."""
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(devices, "time", made)
    return made


@pytest.mark.parametrize("flags, choice",
                         [(["avx2"], "fp32"), (["avx512_bf16"], "bf16"), (["amx_bf16"], "bf16")])
def test_precision_follows_from_the_processor(monkeypatch, flags, choice):
    monkeypatch.setattr(devices, "cpu", lambda: ("some CPU", flags))
    assert devices.pick_precision("cpu") == choice
    assert devices.pick_precision("mps") == "fp32"
    for device in ("cuda", "cuda:1"):
        capability = (8, 0) if choice == "bf16" else (7, 5)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert devices.pick_precision(device) == choice


def test_a_gpu_is_named_by_an_index_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:0", "cuda:1", "cpu"):
        assert devices.pick_device(name) == name
    for name in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(UserError, match=f"--device {name}: no such device; there are cuda:0 to cuda:1"):
            devices.pick_device(name)


def test_the_gpu_that_was_asked_for_is_waited_for_and_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or "card")
    Timer("cuda:1")("part")
    devices.memory_mb("cuda:1")
    assert devices.hardware("cuda:1") == "card" and asked == ["cuda:1"] * 3


def test_hardware_has_a_name_and_memory_a_size():
    assert devices.hardware("cpu").strip() and "cores" in devices.hardware("cpu")
    if devices.memory_mb("cpu") is None:
        pytest.skip("this system does not say how much memory a process takes")
    # 50 MB, touched, in a process of its own: here they might be memory that another test gave back.
    code = ("import numpy as np; from parts import devices; before = devices.memory_mb('cpu'); "
            "block = np.ones(50_000_000 // 8); print(devices.memory_mb('cpu') - before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 30 < float(done.stdout) < 80


# --- time

def test_a_timer_adds_up_parts_and_its_table_all_of_them(clock):
    timer = Timer()
    for _ in range(2):
        clock.now += 100
        timer.start()                                      # what came before belongs to no part
        clock.now += 3
        timer("long")
        clock.now += 1
        timer("short")
    assert timer.seconds == {"long": 6, "short": 2}
    assert [line.split() for line in timer.table().splitlines()] == [
        ["part", "seconds", "share"], ["long", "6.0", "75.0", "%"], ["short", "2.0", "25.0", "%"],
        ["all", "8.0"]]
    devices.ignore("part")
