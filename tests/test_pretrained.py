"""Claims about loading pretrained parts, and about all of them in one training run.

Each family is a tiny random model of its real class, saved as a hub repository would hold it."""
import json
import os
import shutil

import pytest
import torch
from conftest import in_process
from tiny_models import noise, tiny_model, write_recordings

import evaluate
import regime
import train
from parts import pretrained
from parts.audio import RATE
from parts.band_limit import band_limit
from parts.errors import UserError
from parts.pretrained_teacher import PretrainedTeacher


@pytest.fixture(scope="session")
def recordings(tmp_path_factory, waves):
    return write_recordings(tmp_path_factory.mktemp("recordings"), waves)


# --- loading

def test_code_from_elsewhere_runs_only_when_the_flag_says_so(tmp_path):
    folder = tiny_model("usad", tmp_path)
    mark = tmp_path / "ran"
    code = next(folder.glob("*.py"))
    code.write_text(f"open({str(mark)!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(UserError, match="--trust-remote-code"):
        PretrainedTeacher(str(folder))
    assert not mark.exists()
    assert PretrainedTeacher(str(folder), trust=True).rate == 50 and mark.exists()


def test_pickled_weights_are_read_only_when_the_flag_says_so(tmp_path):
    from safetensors.torch import load_file
    folder = tiny_model("hubert", tmp_path)
    expected = PretrainedTeacher(str(folder))(noise(4_000))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--allow-pickle"):
        PretrainedTeacher(str(folder))
    assert torch.equal(PretrainedTeacher(str(folder), pickles=True)(noise(4_000)), expected)


def test_a_model_that_lacks_weights_is_refused_and_one_that_lacks_what_nothing_reads_is_not(tmp_path):
    """transformers would fill them with random numbers, and say nothing."""
    from safetensors.torch import load_file, save_file
    folder = tiny_model("hubert", tmp_path)
    file = folder / "model.safetensors"
    whole, expected = load_file(file), PretrainedTeacher(str(folder))(noise(4_000))
    mask, weight = (next(name for name in whole if part in name) for part in ("masked_spec", "layers.1"))
    save_file({name: x for name, x in whole.items() if name != mask}, file, {"format": "pt"})
    assert torch.equal(PretrainedTeacher(str(folder))(noise(4_000)), expected)

    save_file({name: x for name, x in whole.items() if name != weight}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 of the model's weights \\({weight}\\)"):
        PretrainedTeacher(str(folder))


@pytest.mark.parametrize("name, message", [
    ("./nowhere", "--teacher ./nowhere: no such folder"),
    ("", "--teacher : no such folder"),
    ("MIT-SLS/USAD-Base",
     "hf download MIT-SLS/USAD-Base --local-dir models/USAD-Base; then --teacher models/USAD-Base"),
])
def test_what_is_not_here_ends_in_one_line_that_says_where_to_get_it(name, message, monkeypatch):
    monkeypatch.setattr(pretrained, "hub_in_reach", lambda: False)
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as error:
        PretrainedTeacher(name)
    assert "\n" not in str(error.value)


DAMAGE = {
    "whole": lambda snapshot: None,
    "cut off": lambda snapshot: os.truncate(snapshot / "model.safetensors", 900),
    "no weights": lambda snapshot: (snapshot / "model.safetensors").unlink(),
    "no JSON": lambda snapshot: (snapshot / "config.json").write_text("{"),
    "nothing": shutil.rmtree,
}


@pytest.mark.parametrize("damage, message", [
    ("whole", None),
    ("cut off", "incomplete or damaged.*hf download owner/hubert --force-download"),
    ("no weights", "download on this machine is incomplete or damaged"),
    ("no JSON", "download on this machine is incomplete or damaged"),
    ("nothing", "not on this machine"),
])
def test_a_damaged_download_is_told_from_one_that_was_never_made(tmp_path, monkeypatch, damage, message):
    """In a cache laid out as the hub's client does."""
    from huggingface_hub import constants
    monkeypatch.setattr(pretrained, "hub_in_reach", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--hubert"
    snapshot = tiny_model("hubert", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    DAMAGE[damage](snapshot)
    if message is None:
        assert PretrainedTeacher("owner/hubert").rate == 50
        return
    with pytest.raises(UserError, match=f"--teacher owner/hubert: .*{message}") as error:
        PretrainedTeacher("owner/hubert")
    assert "\n" not in str(error.value)


# --- everything at once

@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_pretrained_parts_in_every_slot_train_score_and_are_used_from_their_run_folder(
        tiny, recordings, tmp_path, monkeypatch, task):
    """HuBERT as teacher, DAC as codec, T5 as text encoder: the same loop, resumed, then generate or upsample;
    the DAC model itself is not in the checkpoint."""
    hubert = tiny_model("hubert", tmp_path / "hubert")
    dac = tiny_model("dac", tmp_path / "dac")
    t5 = tiny_model("t5", tmp_path / "t5")
    given = {
        **tiny, "task": task, "data": str(recordings), "val_fold": 3, "out": str(tmp_path / "run"),
        "teacher": str(hubert), "teacher_layer": 1, "codec": str(dac), "text": str(t5), "channels": 8,
        "steps": 6, "eval_every": 6, "seconds": 1.0, "score_clips": 4, "probe": "always", "recipe": "static",
    }
    monkeypatch.setattr(regime, "probe_steps", lambda K: [2, 4])
    monkeypatch.setattr(train, "draw_pages", lambda *a: None)  # drawn elsewhere, and slow
    out = train.train(given)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    probes = [row for row in rows if "D" in row]
    assert [row["step"] for row in probes] == [2, 4] and all(-1e-5 < row["D"] < 2 for row in probes)
    assert any(row.get("loss_ssl", 0) > 0 for row in rows)

    train.train({"steps": 8}, str(out))
    assert (out / "checkpoint.pt").stat().st_size < 4e6
    if task == "t2a":
        command = ["generate", out, "--prompt", "a dog, never heard of", "--seconds", "1.0"]
    else:
        import soundfile
        soundfile.write(tmp_path / "m.wav", band_limit(noise(20_000, 1)[0].numpy(), 2_000), RATE)
        command = ["upsample", out, "--input", tmp_path / "m.wav", "--cutoff", "2000"]
    done = in_process(evaluate, *command, "--out", tmp_path / "x.wav", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    shutil.rmtree(dac)
    done = in_process(evaluate, "sounds", out, cwd=tmp_path)
    assert done.returncode == 2 and f"--codec {dac}: no such folder" in done.stderr


@pytest.mark.parametrize("flag", ["--teacher", "--codec", "--text"])
def test_a_part_that_is_missing_is_named_before_anything_is_prepared(tmp_path, flag):
    done = in_process(train, flag, "./nowhere", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and f"{flag} ./nowhere: no such folder" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_folder_cannot_ask_for_its_own_code_to_be_run(tiny, recordings, tmp_path, monkeypatch):
    """trust_remote_code in a config.json counts for nothing: resuming needs the flag again."""
    monkeypatch.setattr(train, "draw_pages", lambda *a, **k: None)
    monkeypatch.setattr(evaluate, "score", lambda *a, **k: None)
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    usad = tiny_model("usad", tmp_path / "usad")
    run = tmp_path / "run"
    given = {
        **tiny, "data": str(recordings), "val_fold": 3, "out": str(run), "teacher": str(usad), "steps": 2,
        "eval_every": 2, "score_clips": 2, "recipe": "static",
    }
    with pytest.raises(UserError, match="--trust-remote-code"):
        train.train(given)
    train.train({**given, "trust_remote_code": True})
    assert json.loads((run / "config.json").read_text())["trust_remote_code"] is True
    with pytest.raises(UserError, match="--trust-remote-code"):
        train.train({"steps": 3}, str(run))
    train.train({"steps": 3, "trust_remote_code": True}, str(run))
