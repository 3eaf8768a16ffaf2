"""Claims about the run folder: its settings, checkpoints, log, lock and export. (A disk that fills up, kills
and damaged files: test_robust.py.)"""
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, in_process
from run_files import final

import evaluate
import train
from parts import runs
from parts.config import Config
from parts.errors import UserError

CPU = {"device": "cpu"}
WEIGHTS = {"w": torch.arange(3.0)}


def a_run(folder, **settings):
    """A folder with settings and nothing else; returns it."""
    folder.mkdir()
    runs.save_config(folder, Config(device="cpu", **settings))
    return folder


def save(folder, step=1, **state):
    """A checkpoint of the run in `folder`."""
    saved = {"step": step, "config": runs.load_config(folder), "optimizer": [], **state}
    runs.save_checkpoint(folder / "checkpoint.pt", **saved)


# --- settings

def test_settings_come_back_as_they_were_saved(tmp_path):
    run = a_run(tmp_path / "run", lr=0.1 + 0.2, regime="replay:x.jsonl", profile=True)
    assert runs.load_config(run) == dataclasses.asdict(
        Config(device="cpu", lr=0.1 + 0.2, regime="replay:x.jsonl", profile=True))


@pytest.mark.parametrize("text, message", [
    (None, "not a run folder .no config.json"), ("{", "not valid JSON"), ("[" * 10_000, "not valid JSON"),
    ("[]", "holds no settings"),
])
def test_settings_that_cannot_be_read_are_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        runs.load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_new_run_needs_a_folder_of_its_own(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        cfg, checkpoint = runs.open_settings({**CPU, "out": str(tmp_path / name)}, "")
        assert cfg.out == str(tmp_path / name) and checkpoint is None
    (tmp_path / "empty" / "x").write_text("")
    with pytest.raises(UserError, match="folder is not empty; resume it with --resume"):
        runs.open_settings({**CPU, "out": str(tmp_path / "empty")}, "")


def test_a_resumed_run_has_the_settings_of_its_folder_and_those_typed_and_trusts_only_what_is_typed(tmp_path):
    run = a_run(tmp_path / "run", steps=7, seed=3, trust_remote_code=True, allow_pickle=True)
    cfg, checkpoint = runs.open_settings({"steps": 9}, str(run))
    assert (cfg.steps, cfg.seed, cfg.out) == (9, 3, str(run))
    assert checkpoint is None, "it died before its first one: from the start"
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


# --- checkpoints

def test_the_newest_checkpoint_is_read_and_the_one_before_stays(tmp_path):
    run = a_run(tmp_path / "run")
    assert not runs.has_checkpoint(run)
    for step in (1, 2, 3):
        save(run, step, model=WEIGHTS)
    assert runs.has_checkpoint(run) and final(run)["step"] == 3
    assert torch.equal(final(run)["model"]["w"], WEIGHTS["w"])
    previous = torch.load(run / "checkpoint-previous.pt", weights_only=True)
    assert previous["step"] == 2 and not list(run.glob("*.tmp"))


def test_a_missing_newest_checkpoint_falls_back_with_a_warning(tmp_path, capsys):
    run = a_run(tmp_path / "run")
    save(run, 1)
    save(run, 2)
    (run / "checkpoint.pt").unlink()
    assert final(run)["step"] == 1
    assert "is missing; going on from checkpoint-previous.pt, step 1" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_or_version_is_refused(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run")
    save(run, config={**runs.load_config(run), "width": 64})
    with pytest.raises(UserError, match="width is 128 in config.json and 64 in checkpoint.pt"):
        final(run)
    monkeypatch.setattr(runs, "VERSION", 1)
    save(run)
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"of version 1, this code reads version {runs.VERSION}"):
        final(run)


def test_checkpoints_that_would_run_code_are_refused(tmp_path, t2a_run):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    (tmp_path / "config.json").write_text((t2a_run / "config.json").read_text())
    with open(tmp_path / "checkpoint.pt", "wb") as f:
        pickle.dump({"step": Evil()}, f, protocol=2)
    with pytest.raises(UserError, match="can't be read"):
        evaluate.load_run(tmp_path)


def test_weights_of_another_model_are_refused_by_name(tmp_path, t2a_run):
    checkpoint = torch.load(t2a_run / "checkpoint.pt", weights_only=True)
    del checkpoint["ema"]["head.bias"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_text((t2a_run / "config.json").read_text())
    done = in_process(evaluate, "sounds", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "head.bias" in done.stderr and str(tmp_path) in done.stderr


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
from parts import runs
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


# --- small ones for sharing

def test_exported_runs_are_small_and_sound_the_same(t2a_run, tmp_path):
    small = tmp_path / "small"
    assert in_process(evaluate, "export", t2a_run, small, cwd=tmp_path).returncode == 0
    size = (t2a_run / "checkpoint.pt").stat().st_size
    assert (small / "checkpoint.pt").stat().st_size < 0.4 * size
    whole, exported = (evaluate.generate_latents(evaluate.load_run(path), ["rain"], [0])
                       for path in (t2a_run, small))
    assert (whole - exported).abs().max() < 0.05
    assert str(t2a_run) not in (small / "config.json").read_text(), "the path is of this machine"
    before = (small / "checkpoint.pt").read_bytes()
    assert in_process(evaluate, "export", t2a_run, small, cwd=tmp_path).returncode == 0, "over an export"
    assert (small / "checkpoint.pt").read_bytes() == before and not list(small.glob("*previous*"))


def test_an_export_never_takes_the_place_of_a_run_that_can_be_trained(t2a_run, tmp_path):
    before = (t2a_run / "checkpoint.pt").read_bytes()
    done = in_process(evaluate, "export", t2a_run, t2a_run, cwd=tmp_path)
    assert done.returncode == 2 and "export to another folder" in done.stderr
    assert (t2a_run / "checkpoint.pt").read_bytes() == before
