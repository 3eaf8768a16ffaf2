"""Claims about the run folder: its settings, log and lock. (A disk that fills up, kills
and damaged files: test_robust.py.)"""
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, in_process
from run_files import a_run, save

import train
from parts import config, runs
from parts.config import Config
from parts.errors import Stopped, UserError

CPU = {"device": "cpu"}
WEIGHTS = {"w": torch.arange(3.0)}


# --- log

def test_a_log_is_read_without_a_line_that_was_cut_off_and_a_damaged_one_is_named(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert runs.read_log(tmp_path) == [{"step": 1}, {"step": 2}]
    log.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match="log.jsonl, line 2: damaged, no row of a log"):
        runs.read_log(tmp_path)
    for line in ("5", "[]", '{"loss": 1}', '{"step": "x"}', "[" * 10_000):
        log.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match="line 2: damaged"):
            runs.read_log(tmp_path)
        runs.Log(log, 3)
        assert runs.read_log(tmp_path) == [{"step": 1}, {"step": 3}], "a resumed run has mended it"


# --- settings

def test_settings_come_back_as_they_were_saved(tmp_path):
    run = a_run(tmp_path / "run", lr=0.1 + 0.2, regime="replay:x.jsonl", profile=True)
    assert config.load_config(run) == dataclasses.asdict(
        Config(device="cpu", lr=0.1 + 0.2, regime="replay:x.jsonl", profile=True))


@pytest.mark.parametrize("text, message", [
    (None, "not a run folder .no config.json"), ("{", "config.json: damaged"), ("[]", "list, not an object"),
    ("[" * 10_000, "config.json: damaged"),
])
def test_settings_that_cannot_be_read_are_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        config.load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_new_run_needs_a_folder_of_its_own(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        cfg, checkpoint = runs.open_settings({**CPU, "out": str(tmp_path / name)}, "")
        assert cfg.out == str(tmp_path / name) and checkpoint is None
    (tmp_path / "empty" / "x").write_text("")
    with pytest.raises(UserError, match="folder is not empty; choose another"):
        runs.open_settings({**CPU, "out": str(tmp_path / "empty")}, "")
    with pytest.raises(UserError, match="folder is not empty; resume it with --resume"):
        runs.open_settings({**CPU, "out": str(a_run(tmp_path / "run"))}, "")
    with pytest.raises(UserError, match="--out .*x: must be a folder, and this is a file"):
        runs.open_settings({**CPU, "out": str(tmp_path / "empty" / "x")}, "")


def test_a_resumed_run_has_the_settings_of_its_folder_and_those_typed_and_trusts_only_what_is_typed(tmp_path):
    run = a_run(tmp_path / "run", steps=7, seed=3, trust_remote_code=True, allow_pickle=True)
    cfg, checkpoint = runs.open_settings({"steps": 9}, str(run))
    assert (cfg.steps, cfg.seed, cfg.out) == (9, 3, str(run))
    assert checkpoint is None, "it died before its first one: from the start"
    with pytest.raises(UserError, match="--steps 0: must be positive"):
        runs.open_settings({"steps": 0}, str(run))
    assert not cfg.trust_remote_code and not cfg.allow_pickle
    save(run, step=7)
    cfg, checkpoint = runs.open_settings({"steps": 8, "allow_pickle": True}, str(run))
    assert checkpoint["step"] == 7 and cfg.allow_pickle and not cfg.trust_remote_code
    with pytest.raises(UserError, match="already has 7 steps; give a larger number"):
        runs.open_settings({"steps": 7}, str(run))


def test_a_used_run_folder_is_not_overwritten(t2a_run, sr_run, tmp_path):
    for argv, message in (
        (("--out", t2a_run), "not empty"),
        (("--out", sr_run), "not empty"),
        (("--resume", t2a_run, "--lr", 1), "own settings"),
        (("--resume", t2a_run, "--steps", 5), "already has 12"),
        (("--resume", ROOT / "assets" / "demo"), "exported checkpoint"),
    ):
        done = in_process(train, *argv, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr


# --- log and lock

def test_a_log_goes_on_after_its_step_without_later_and_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines, "no json", '{"step": 2, "torn']))
    log = runs.Log(path, 2)
    log({"step": 3, "again": True})
    log.sync()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert runs.Log(tmp_path / "new.jsonl", 0).path.read_text() == "", "a new one is empty"


CLAIM = """
import pathlib, sys
from parts import checkpoints, config, runs
from parts.errors import run_cli
def main():
    with runs.RunLock() as lock:
        lock.claim(pathlib.Path(sys.argv[1]))
        print("claimed")
run_cli(main)
"""


def test_only_one_process_trains_in_a_run_folder(tmp_path):
    def claim_elsewhere():
        command = [sys.executable, "-c", CLAIM, tmp_path]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    with runs.RunLock() as lock:
        lock.claim(tmp_path)
        refused = claim_elsewhere()
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr == (f"error: {tmp_path}: another process is training this run; wait for it, or "
                                  "end it\n")
    assert claim_elsewhere().stdout == "claimed\n"


def test_a_run_that_is_interrupted_outside_of_its_steps_says_how_it_goes_on(tmp_path):
    """In preparation, or while it is scored. (Between steps: test_robust.py.)"""
    folder = tmp_path / "my run"
    folder.mkdir()
    with pytest.raises(Stopped, match=f"stopped; continue with: python train.py --resume '{folder}'$"):
        with runs.RunLock() as lock:
            lock.claim(folder)
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        with runs.RunLock():
            raise KeyboardInterrupt


@pytest.mark.parametrize("ends_with, stays", [
    (None, True), (UserError("no"), False), (Stopped("later"), True), (RuntimeError("broken"), True)])
def test_a_refused_folder_is_left_without_a_lock_file_and_a_run_keeps_its_own(tmp_path, ends_with, stays):
    def end():
        with runs.RunLock() as lock:
            lock.claim(tmp_path)
            if ends_with:
                raise ends_with

    for there_before in (False, True):
        (tmp_path / ".lock").unlink(missing_ok=True)
        if there_before:
            (tmp_path / ".lock").touch()
        if ends_with:
            with pytest.raises(type(ends_with)):
                end()
        else:
            end()
        assert (tmp_path / ".lock").exists() == (stays or there_before)


def test_resuming_what_can_not_be_resumed_changes_nothing_in_its_folder(tmp_path):
    folder = shutil.copytree(ROOT / "assets" / "demo", tmp_path / "demo")
    before = sorted(path.name for path in folder.iterdir())
    done = in_process(train, "--resume", folder, cwd=tmp_path)
    assert done.returncode == 2 and sorted(path.name for path in folder.iterdir()) == before
