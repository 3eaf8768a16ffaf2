"""Claims about checkpoints: what is read, what is refused, what an export holds. (Full disks, kills, damaged
files: test_robust.py.)"""
import pickle
import shutil

import pytest
import torch
from conftest import in_process
from run_files import a_run, final, save

import evaluate
from parts import checkpoints, config, runs
from parts.errors import UserError

WEIGHTS = {"w": torch.arange(3.0)}


def test_the_newest_checkpoint_is_read_and_the_one_before_stays(tmp_path):
    run = a_run(tmp_path / "run")
    assert not checkpoints.has_checkpoint(run)
    for step in (1, 2, 3):
        save(run, step, model=WEIGHTS)
    assert checkpoints.has_checkpoint(run) and final(run)["step"] == 3
    assert torch.equal(final(run)["model"]["w"], WEIGHTS["w"])
    previous = torch.load(run / "checkpoint-previous.pt", weights_only=True)
    assert previous["step"] == 2 and not list(run.glob("*.tmp"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run = a_run(tmp_path / "run")
    save(run, config={**config.load_config(run), "width": 64})
    with pytest.raises(UserError, match="width is 128 in config.json and 64 in checkpoint.pt"):
        final(run)


def test_checkpoints_that_would_run_code_are_refused(tmp_path, t2a_run, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    (tmp_path / "config.json").write_text((t2a_run / "config.json").read_text())
    with open(tmp_path / "checkpoint.pt", "wb") as f:
        pickle.dump({"step": Evil()}, f, protocol=2)
    with pytest.raises(UserError, match="can't be read"):
        evaluate.load_run(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_weights_of_another_model_are_refused_by_name(tmp_path, t2a_run):
    checkpoint = torch.load(t2a_run / "checkpoint.pt", weights_only=True)
    del checkpoint["ema"]["head.bias"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_text((t2a_run / "config.json").read_text())
    done = in_process(evaluate, "sounds", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "head.bias" in done.stderr and str(tmp_path) in done.stderr


def test_exported_runs_are_small_and_sound_the_same(t2a_run, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    shutil.copy(t2a_run / "config.json", small)                # an export by earlier code stands there
    state = torch.load(t2a_run / "checkpoint.pt", weights_only=True)
    torch.save({name: part for name, part in state.items() if name != "optimizer"}, small / "checkpoint.pt")
    done = in_process(evaluate, "export", t2a_run, small, cwd=tmp_path)
    assert done.returncode == 0 and "model.safetensors" in done.stdout, done.stderr
    assert {path.name for path in small.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    size = (t2a_run / "checkpoint.pt").stat().st_size
    assert (small / "model.safetensors").stat().st_size < 0.4 * size
    whole, exported = (evaluate.generate_latents(evaluate.load_run(path), ["rain"], [0])
                       for path in (t2a_run, small))
    assert (whole - exported).abs().max() < 0.05
    assert str(t2a_run) not in (small / "config.json").read_text(), "the path is of this machine"
    before = final(small)
    assert in_process(evaluate, "export", small, small, cwd=tmp_path).returncode == 0, "an export of itself"
    after = final(small)
    assert all(torch.equal(after["ema"][name], before["ema"][name]) for name in before["ema"])
    assert {**after, "ema": 0, "codec": 0} == {**before, "ema": 0, "codec": 0}
    with pytest.raises(UserError, match="exported checkpoint"):
        runs.open_settings({}, str(small))


def test_an_export_that_is_damaged_or_of_another_version_is_refused_in_one_line(t2a_run, tmp_path):
    small = tmp_path / "small"
    checkpoints.export(t2a_run, small)
    whole = final(small)
    older = {**whole, "version": 1}
    checkpoints._save_exported(small / "older.safetensors", **older)
    for content, said in ((b"", "can't be read"), (b"no safetensors", "can't be read"),
                          ((small / "older.safetensors").read_bytes(), "of version 1")):
        (small / "model.safetensors").write_bytes(content)
        done = in_process(evaluate, "sounds", small, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr


def test_an_export_never_takes_the_place_of_a_run_that_can_be_trained(t2a_run, tmp_path):
    before = (t2a_run / "checkpoint.pt").read_bytes()
    done = in_process(evaluate, "export", t2a_run, t2a_run, cwd=tmp_path)
    assert done.returncode == 2 and "export to another folder" in done.stderr
    assert (t2a_run / "checkpoint.pt").read_bytes() == before
