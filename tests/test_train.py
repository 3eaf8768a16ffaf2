"""Claims about the training loop and its command line."""
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from conftest import ROOT


def final(path):
    return evaluate.load_checkpoint(path)[1]


def losses(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    return all(torch.equal(a[k][n], b[k][n]) for k in ("model", "ema") for n in a[k])


def test_a_run_folder_holds_what_tools_expect(t2a_run, sr_run):
    for run in (t2a_run, sr_run):
        names = {p.name for p in run.iterdir()}
        assert {"config.json", "log.jsonl", "checkpoint.pt", "samples", "dashboard.png", "scores.json"} <= names
        assert list((run / "samples").glob("*.wav")) and list((run / "samples").glob("*.png"))
        rows = losses(run)
        keys = {"step", "loss", "loss_fm", "loss_ssl", "loss_struct", "lambda", "struct_active", "t_mean", "lr", "grad_norm", "step_s"}
        assert all(set(r) == keys for r in rows if "loss" in r)
        evals = [r for r in rows if "eval" in r]
        assert [r["step"] for r in evals] == [6, 12] and len(evals[0]["eval"]["val_loss_t"]) == 10
        assert set(json.loads((run / "config.json").read_text())) == {f.name for f in train.dataclasses.fields(train.Config)}


def test_training_beats_the_constant_predictor(tiny, tmp_path):
    """v = 0 costs E|v|^2; after 60 steps of a tiny network the held-out loss is clearly lower at every noise level."""
    run = train.train({**tiny, "task": "t2a", "out": str(tmp_path / "r"), "steps": 60, "eval_every": 60, "lr": 4e-3, "width": 64})
    by_t = losses(run)[-1]["eval"]["val_loss_t"]
    world = data.SoundWorld("val", 256)
    codec = evaluate.load_run(run).codec
    var = float(codec.encode(torch.as_tensor(np.stack([world.wave(i) for i in range(64)]))).square().mean())
    assert np.mean(by_t) < 0.8 * (1 + var) and all(x < 1 + var for x in by_t)


def test_resuming_equals_never_having_stopped(tiny, t2a_run, tmp_path):
    """6 steps, then 6 more, bitwise equal to 12; also checks that --resume can extend a finished run."""
    half = train.train({**tiny, "task": "t2a", "out": str(tmp_path / "half"), "steps": 6})
    train.train({"steps": 12}, str(half))
    assert same_weights(final(half), final(t2a_run)) and final(half)["step"] == 12
    steps = [r["step"] for r in losses(half) if "loss" in r]
    assert steps == sorted(set(steps))


def test_a_reference_centre_of_zero_is_off_bitwise(tiny, tmp_path):
    """Neutral element: `constant` at m = 0 is `off`; negative control: m = 1 is not."""
    runs = [train.train({**tiny, "task": "sr", "steps": 3, "out": str(tmp_path / name), **k}) for name, k in
            (("off", {"timesteps": "off"}), ("zero", {"timesteps": "constant", "t_mean": 0.0}), ("one", {"timesteps": "constant", "t_mean": 1.0}))]
    a, b, c = map(final, runs)
    assert same_weights(a, b) and not same_weights(a, c)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_parameter_has_exactly_one_optimizer(name):
    """Muon takes block matrices only; embeddings, head and biases stay with AdamW."""
    model = train.DiT(8, 32, 2, 2, vocab=20)
    opts = train.make_optimizers(model, train.Config(optimizer=name, device="cpu"))
    owned = [[p for g in opt.param_groups for p in g["params"]] for opt in opts]
    assert sorted(map(id, sum(owned, []))) == sorted(map(id, model.parameters()))
    assert [type(o).__name__ for o in opts] == (["AdamW", "Muon"] if name == "muon" else ["AdamW"])
    if name == "muon":
        ids = {id(p) for p in owned[1]}
        assert id(model.blocks[0].qkv.weight) in ids and not {id(model.text.embed.weight), id(model.head.weight), id(model.embed.weight)} & ids


def test_previews_come_from_the_average_in_eval_mode(t2a_run):
    run = evaluate.load_run(t2a_run)
    ckpt = final(t2a_run)
    assert torch.equal(run.model.state_dict()["head.weight"], ckpt["ema"]["head.weight"])
    assert not torch.equal(ckpt["ema"]["head.weight"], ckpt["model"]["head.weight"]) and not run.model.training
    run.model.train()
    with pytest.raises(AssertionError, match="eval mode"):
        evaluate.preview_pairs(run, data.SoundWorld("val", 4))


def test_a_second_run_reuses_the_caches(tiny, t2a_run, tmp_path, monkeypatch):
    def refuse(*a):
        raise RuntimeError("rendered again")
    monkeypatch.setattr(data, "_render_chunk", refuse)
    monkeypatch.setattr(data, "_encode_chunk", refuse)
    train.train({**tiny, "task": "t2a", "out": str(tmp_path / "again"), "steps": 1})


def test_own_recordings_train_both_tasks(tiny, tmp_path):
    from test_data import make_folder
    names = [f"audio/{k}.flac" for k in range(24)]
    folder = make_folder(tmp_path / "mine", names, [(n, f"tone number {k}", 1 + k % 3) for k, n in enumerate(names)], ("file_name", "caption", "fold"))
    for task in ("t2a", "sr"):
        run = train.train({**tiny, "task": task, "data": str(folder), "val_fold": 2, "out": str(tmp_path / task), "steps": 2, "eval_every": 2, "seconds": 1.28})
        assert (run / "dashboard.png").exists() and (run / "scores.json").exists()


# --- command line

def cli(*argv, **k):
    return subprocess.run([sys.executable, ROOT / "train.py", *map(str, argv)], capture_output=True, text=True, **k)


def test_divergence_stops_before_it_spoils_the_weights(tiny, tmp_path, monkeypatch):
    """A non-finite gradient ends the run with one clear line; what was saved stays finite."""
    run = train.train({**tiny, "task": "sr", "steps": 2, "eval_every": 2, "out": str(tmp_path / "r")})
    monkeypatch.setattr(train, "flow_matching_loss", lambda v_hat, v, mask=None: (v_hat * float("nan")).mean((1, 2)))
    with pytest.raises(data.UserError, match="step 3: loss or gradient is not finite"):
        train.train({"steps": 4}, str(run))
    assert final(run)["step"] == 2 and all(torch.isfinite(v).all() for v in final(run)["model"].values())


def test_the_default_split_holds_out_files_without_a_fold_column(tmp_path):
    from test_data import make_folder
    names = [f"{k}.wav" for k in range(5)]
    folder = make_folder(tmp_path / "mine", names, [(n, "a tone") for n in names], ("file_name", "caption"))
    sizes = [len(data.open_data(str(folder), s, 0, train.Config().val_fold)) for s in ("train", "val")]
    assert sizes == [4, 1]


@pytest.mark.parametrize("argv, message", [
    (("--stepz", 3), "unrecognized arguments: --stepz"),
    (("--steps", "many"), "invalid int value"),
    (("--steps", 0), "--steps 0: must be positive"),
    (("--task", "tts"), "invalid choice: 'tts'"),
    (("--data", "no/such/folder"), "no such folder"),
    (("--resume", "no/such/run"), "not a run folder"),
    (("--width", 30), "--heads 4: must be"),
    (("--heads", 0), "--heads 0: must be"),
    (("--seed", -1), "--seed -1: must be"),
    (("--device", "abacus"), "--device abacus: not here"),
])
def test_bad_flags_end_with_status_2_and_leave_nothing(tmp_path, argv, message):
    done = cli(*argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_used_run_folder_is_not_overwritten(t2a_run, sr_run):
    for argv, message in ((("--out", t2a_run), "not empty"), (("--resume", t2a_run, "--lr", 1), "own settings"), (("--resume", t2a_run, "--steps", 5), "already has 12"),
                          (("--resume", ROOT / "assets" / "demo"), "exported or foreign")):
        done = cli(*argv)
        assert done.returncode == 2 and message in done.stderr


def test_terminated_runs_save_and_say_how_to_continue(tiny, tmp_path):
    """SIGTERM between evaluations: the step is finished and saved; resumed, it ends bitwise like a run that was left alone."""
    settings = {**tiny, "task": "sr", "steps": 400, "eval_every": 1_000}
    flags = [x for k, v in {**settings, "out": tmp_path / "r"}.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    p = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "r" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 1:
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    err = p.communicate(timeout=120)[1]
    step = final(tmp_path / "r")["step"]
    assert p.returncode == 2 and f"continue with: python train.py --resume {tmp_path / 'r'}" in err and 10 <= step < 400
    train.train({"steps": step + 3}, str(tmp_path / "r"))
    straight = train.train({**settings, "steps": step + 3, "out": str(tmp_path / "straight")})
    assert same_weights(final(tmp_path / "r"), final(straight))


# --- the README

def test_every_command_in_the_readme_exists():
    """Each `python X.py ...` line parses: known script, known flags (values are not run here)."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"python (train|evaluate)\.py([^\n`#]*)", text)
    assert len(commands) > 8
    known = {"train": {f"--{f.name.replace('_', '-')}" for f in train.dataclasses.fields(train.Config)} | {"--resume", "--help"},
             "evaluate": set(re.findall(r'"(--[a-z-]+)"', (ROOT / "evaluate.py").read_text()))}
    for script, rest in commands:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known[script], rest


def test_results_behind_the_readme_exist():
    for name in re.findall(r"results/[\w.-]+\.json", (ROOT / "README.md").read_text()):
        assert json.loads((ROOT / name).read_text()), name


@pytest.mark.parametrize("script", ["data.py", "model.py", "sampler.py", "regime.py"])
def test_concept_demos_run(script):
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 5, done.stderr


def test_modules_speak_of_concepts_and_never_of_each_other():
    """sampler.py imports no project file; model.py knows neither data nor training."""
    imports = lambda f: set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f).read_text(), re.M))
    ours = {p.stem for p in Path(ROOT).glob("*.py")}
    assert not imports("sampler.py") & ours and not imports("regime.py") & ours and not imports("model.py") & ours and not imports("data.py") & ours
