"""Claims about the training loop and its command line."""
import dataclasses
import itertools
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
from conftest import ROOT, in_process

import config
import data
import evaluate
import guidance
import model as M
import regime
import sampler
import structure_reg
import train


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
        keys = {"step", "loss", "loss_fm", "loss_ssl", "loss_struct", "lambda", "mu", "m", "r", "struct_active", "t_drawn", "lr", "grad_norm", "step_s"}
        assert all(set(r) == keys for r in rows if "loss" in r)
        evals = [r for r in rows if "eval" in r]
        assert [r["step"] for r in evals] == [6, 12] and len(evals[0]["eval"]["val_loss_t"]) == 10
        assert set(json.loads((run / "config.json").read_text())) == {f.name for f in dataclasses.fields(config.Config)}


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


# --- the mechanisms: off, on, and driven

def plain_loop(tiny, steps: int, task: str) -> dict:
    """What training is without any mechanism, written down again: data, one loss, one optimizer, an average. -> weights."""
    world = data.SoundWorld("train", tiny["clips"]).prepare(0)
    codec = M.Codec(tiny["channels"]).fit(world.wave(i)[: 10 * 16_000] for i in np.random.default_rng(0).permutation(len(world))[:500])
    z, muffled = data.LatentCache(world, codec), data.LatentCache(world, codec, tiny["variants"], 0) if task == "sr" else None
    captions = [[world.caption(i, k) for k in range(4)] for i in range(len(world))]
    words = M.Words.fit(c for cs in captions for c in cs)
    torch.manual_seed(0)
    model = M.DiT(tiny["channels"], tiny["width"], tiny["depth"], tiny["heads"], len(words) if task == "t2a" else 0, task == "sr")
    average = {k: v.clone() for k, v in model.state_dict().items()}
    adam = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(1, steps + 1):
        adam.param_groups[0]["lr"] = 2e-3 * min(1, step / tiny["warmup"])
        g = torch.Generator().manual_seed(step)
        b = data.draw_batch(z, muffled, tiny["batch"], 64, np.random.default_rng([0, 1, step]))
        x0 = torch.from_numpy(b["x0"])
        eps, t = torch.randn(x0.shape, generator=g), sampler.sample(len(x0), 0.0, 1.0, generator=g)
        drop, x_t = torch.rand(len(x0), generator=g) < 0.1, (1 - t[:, None, None]) * x0 + t[:, None, None] * eps
        if task == "t2a":
            rows = [words.encode([captions[i][k % 4]])[0] for i, k in zip(b["i"], b["wording"])]
            v_hat = model(x_t, t, model.encode_text(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), drop))
        else:
            v_hat = model(x_t, t, None, torch.from_numpy(b["cond"]), None, drop)
        loss = (v_hat - (eps - x0)).square().mean(-1).mean(1).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        for k, v in model.state_dict().items():
            average[k].lerp_(v, 1 - min(0.9999, (1 + step) / (10 + step)))
    return {"model": model.state_dict(), "ema": average}


@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_off_is_bitwise_a_plain_loop(tiny, tmp_path, task, bare):
    """All mechanisms off, 20 steps, with and without probes: the parameters of an independent loop. Negative control: one more step."""
    plain = plain_loop(tiny, 20, task)
    settings = {**tiny, "task": task, "recipe": "vanilla", "optimizer": "adamw", "steps": 20, "eval_every": 20}
    for probe in ("auto", "always"):
        assert same_weights(plain, final(train.train({**settings, "probe": probe, "out": str(tmp_path / probe)})))
    assert not same_weights(plain, plain_loop(tiny, 21, task))


def test_a_mechanism_draws_nothing_from_the_others(tiny, tmp_path, bare):
    """With learning rates too small to move a weight, the flow-matching losses of all steps are equal whatever is switched on (and the
    timesteps have equal ends), so data, noise, t and initial weights are. Negative control: another centre."""
    still = {**tiny, "task": "t2a", "steps": 20, "eval_every": 20, "lr": 1e-30, "muon_lr": 1e-30, "weight_decay": 0.0, "probe": "never", "regime": "clock",
             "timesteps": "constant", "m_late": 0.5, "m_early": 0.5}
    arms = {"off": {"guidance": "off", "structure": "off"}, "guidance": {"guidance": "constant", "structure": "off"}, "structure": {"guidance": "off", "structure": "constant"},
            "timesteps": {"guidance": "off", "structure": "off", "timesteps": "adaptive"}, "another": {"guidance": "off", "structure": "off", "m_late": 1.5}}
    fm = {name: [r["loss_fm"] for r in losses(train.train({**still, **arm, "out": str(tmp_path / name)})) if "loss" in r] for name, arm in arms.items()}
    assert len(fm["off"]) >= 2 and all(np.allclose(fm[k], fm["off"], atol=1e-6) for k in ("guidance", "structure", "timesteps"))
    assert not np.allclose(fm["another"], fm["off"], atol=1e-3)


def test_each_mechanism_trains_something_else(tiny, tmp_path, bare):
    """Negative control of the neutral elements: switched on, each one changes the weights."""
    settings = {**tiny, "task": "sr", "steps": 8, "eval_every": 8, "recipe": "vanilla"}
    arms = [{}, {"guidance": "constant"}, {"timesteps": "constant"}, {"structure": "constant"}, {"structure": "constant", "struct_loss": "dispersive"}]
    weights = [final(train.train({**settings, **arm, "out": str(tmp_path / str(k))})) for k, arm in enumerate(arms)]
    assert not any(same_weights(a, b) for k, a in enumerate(weights) for b in weights[:k])


@pytest.fixture(scope="module")
def staged(tiny, tmp_path_factory):
    """40 steps of `stage`: probes from step 16 on, every mechanism adaptive, four blocks."""
    settings = {**tiny, "task": "t2a", "recipe": "stage", "steps": 40, "eval_every": 20, "depth": 4}
    return settings, train.train({**settings, "out": str(tmp_path_factory.mktemp("stage") / "r")})


def test_the_log_holds_the_regime_and_what_it_drives(staged):
    _, run = staged
    rows = [r for r in losses(run) if "loss" in r]
    probes = [r for r in rows if "D" in r]
    assert [r["step"] for r in probes] == regime.probe_steps(40)
    assert set(probes[0]["D_t"]) == {"1.0", "0.9", "0.7", "0.5"} and set(probes[1]["D_t"]) == {"1.0"} and "D_shuffled" in probes[0] and "slope" in probes[-1]
    assert any("structure" in r for r in rows) and any("agreement" in r for r in rows)
    for r in rows:
        assert abs(r["lambda"] - guidance.weight(r["r"], 0.5)) < 1e-9 and abs(r["m"] - sampler.centre(r["r"], 2.0, 1.5)) < 1e-9 and 0 <= r["r"] <= 1
        assert abs(r["loss"] - r["loss_fm"] - r["lambda"] * r["loss_ssl"] - r["mu"] * r["loss_struct"]) < 1e-4


def test_the_clock_is_the_stage_fed_with_its_r(staged, tmp_path, bare):
    """`--regime clock` and a replay of r = k / K: bitwise the same run. Negative control: a replay of another r."""
    settings, _ = staged
    logs = {name: tmp_path / f"{name}.jsonl" for name in ("clock", "half")}
    logs["clock"].write_text("".join(json.dumps({"step": k, "r": k / 40}) + "\n" for k in range(1, 41)))
    logs["half"].write_text(json.dumps({"step": 1, "r": 0.5}) + "\n")
    clock, replay, half = (final(train.train({**settings, **how, "out": str(tmp_path / str(k))})) for k, how in
                           enumerate(({"recipe": "clock"}, {"regime": f"replay:{logs['clock']}"}, {"regime": f"replay:{logs['half']}"})))
    assert same_weights(clock, replay) and not same_weights(clock, half)


def test_a_replay_of_its_own_log_repeats_a_run(staged, tmp_path, bare):
    """What the log says drove each step is what drove it."""
    settings, run = staged
    assert same_weights(final(run), final(train.train({**settings, "regime": f"replay:{run / 'log.jsonl'}", "out": str(tmp_path / "r")})))


def test_a_stopped_stage_run_goes_on_exactly(staged, tmp_path, monkeypatch, bare):
    """SIGTERM at step 20 of 40, resumed: weights, r, lambda, groups and all that is logged are those of the straight run."""
    settings, run = staged
    monkeypatch.setattr(evaluate, "preview", lambda *a: signal.raise_signal(signal.SIGTERM) or {})
    with pytest.raises(data.UserError, match="stopped at step 20"):
        train.train({**settings, "out": str(tmp_path / "r")})
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    train.train({}, str(tmp_path / "r"))
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("step_s", "eval", "memory_mb")} for r in rows]
    assert same_weights(final(run), final(tmp_path / "r")) and strip(losses(run)) == strip(losses(tmp_path / "r"))
    a, b = final(run), final(tmp_path / "r")
    assert a["regime"]["D"] == b["regime"]["D"] and a["structure"]["groups"] == b["structure"]["groups"]
    assert all(torch.equal(x, y) for x, y in zip(a["projector"].values(), b["projector"].values()))


@pytest.mark.parametrize("how", [{"regime": "loss"}, {"signal": "levels"}, {"signal": "ratio"}, {"signal": "latent"}, {"recipe": "stop", "stop_at": 0.5}])
def test_other_sources_signals_and_the_one_shot_end(tiny, tmp_path, how, bare):
    rows = [r for r in losses(train.train({**tiny, "task": "sr", "steps": 40, "eval_every": 40, "out": str(tmp_path / "r"), **how})) if "loss" in r]
    if "recipe" in how:
        assert all((r["lambda"] > 0) == (r["step"] <= 20) for r in rows) and not any("D" in r for r in rows)
    elif "regime" in how:
        assert not any("D" in r for r in rows) and any("slope" in r for r in rows)
    else:
        probe = next(r for r in rows if "D" in r)
        expected = {"levels": np.mean([probe["D_t"][t] for t in ("0.9", "0.7", "0.5")]), "ratio": probe["D_t"]["1.0"] / probe["D_shuffled"], "latent": probe["D_t"]["1.0"]}
        assert abs(probe["D"] - expected[how["signal"]]) < 1e-9


def test_guidance_costs_nothing_after_it_has_decayed(tiny, tmp_path, monkeypatch, bare):
    """r = 0.95 throughout: neither the features are read nor the loss computed. Negative control: at r = 0.5 they are."""
    def refuse(*a):
        raise RuntimeError("computed")
    monkeypatch.setattr(guidance, "alignment_loss", refuse)
    for r in (0.95, 0.5):
        (tmp_path / f"{r}.jsonl").write_text(json.dumps({"step": 1, "r": r}) + "\n")
    settings = {**tiny, "task": "sr", "steps": 4, "eval_every": 4}
    train.train({**settings, "regime": f"replay:{tmp_path / '0.95.jsonl'}", "out": str(tmp_path / "a")})
    with pytest.raises(RuntimeError, match="computed"):
        train.train({**settings, "regime": f"replay:{tmp_path / '0.5.jsonl'}", "out": str(tmp_path / "b")})


def test_negative_control_a_regime_turned_round_drives_everything_the_other_way():
    """drive: r up means lambda down, m towards its late value, mu up; with 1 - r for r each of these claims fails."""
    cfg, latch = config.Config(steps=100), structure_reg.Structure(8)
    latch.latched, latch.groups = 0, [0, 0, 0, 1, 1, 1, 2, 2]
    def holds(turn):
        (l0, m0, mu0, _), (l1, m1, mu1, groups) = (train.drive(cfg, turn(r), 50, latch) for r in (0.1, 0.8))
        return l0 > l1, m0 > m1, mu0 < mu1 and groups == latch.groups
    assert all(holds(lambda r: r)) and not any(holds(lambda r: 1 - r))


def test_constant_structure_keeps_its_groups_by_depth_whatever_is_found_meanwhile():
    latch = structure_reg.Structure(8)
    latch.latched, latch.groups = 0, [0, 1, 0, 1, 0, 1, 2, 2]
    for mode, groups in (("constant", structure_reg.by_depth(8, latch.G)), ("adaptive", latch.groups)):
        assert train.drive(config.Config(steps=100, depth=8, structure=mode), 0.8, 50, latch)[3] == groups


def test_the_profile_accounts_for_all_of_the_time(tiny, tmp_path, capsys, bare):
    train.train({**tiny, "task": "sr", "steps": 20, "eval_every": 20, "profile": True, "out": str(tmp_path / "r")})
    table = re.findall(r"^(\w[\w ]*?)\s+([\d.]+)\s+([\d.]+) %$", capsys.readouterr().out, re.MULTILINE)
    assert {"data", "forward", "backward", "optimizer", "EMA", "probe", "guidance", "structure", "log and evaluation"} == {name for name, *_ in table}
    assert abs(sum(float(share) for *_, share in table) - 100) < 1


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_parameter_has_exactly_one_optimizer(name):
    """Muon takes block matrices only; embeddings, head and biases stay with AdamW."""
    model = M.DiT(8, 32, 2, 2, vocab=20)
    opts = M.make_optimizers(model, name, 1e-3, 1e-3, 0.01)
    owned = [[p for g in opt.param_groups for p in g["params"]] for opt in opts]
    assert sorted(map(id, itertools.chain(*owned))) == sorted(map(id, model.parameters()))
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

def test_the_default_split_holds_out_files_without_a_fold_column(tmp_path):
    from test_data import make_folder
    names = [f"{k}.wav" for k in range(5)]
    folder = make_folder(tmp_path / "mine", names, [(n, "a tone") for n in names], ("file_name", "caption"))
    sizes = [len(data.open_data(str(folder), s, 0, config.Config().val_fold)) for s in ("train", "val")]
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
    (("--regime", "moon"), "--regime moon: unknown regime source"),
    (("--regime", "replay:none.jsonl"), "none.jsonl"),
    (("--probe", "never"), "--probe never: must be auto or always"),
    (("--align", 9), "--align 9: must be a block from 1 to 4"),
    (("--accumulate", 32), "--accumulate 32: must be fewer than --batch"),
    (("--depth", 1), "--depth 1: must be at least 2"),
    (("--clip", 0), "--clip 0.0: must be positive"),
    (("--task", "sr", "--clap", "models/clap"), "--clap models/clap: must be left out with --task sr"),
    (("--recipe", "soup"), "invalid choice: 'soup'"),
    (("--device", "abacus"), "--device abacus: not here"),
])
def test_bad_flags_end_with_status_2_and_leave_nothing(tmp_path, argv, message):
    done = in_process(train, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_used_run_folder_is_not_overwritten(t2a_run, sr_run, tmp_path):
    for argv, message in ((("--out", t2a_run), "not empty"), (("--resume", t2a_run, "--lr", 1), "own settings"), (("--resume", t2a_run, "--steps", 5), "already has 12"),
                          (("--resume", ROOT / "assets" / "demo"), "exported checkpoint")):
        done = in_process(train, *argv, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr


def test_terminated_runs_save_and_say_how_to_continue(tiny, tmp_path):
    """SIGTERM between evaluations: the step is finished and saved; resumed, it ends bitwise like a run that was left alone."""
    settings = {**tiny, "task": "sr", "recipe": "static", "steps": 400, "eval_every": 1_000}  # adaptive ones know how many steps are planned
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


def test_each_change_of_phase_is_said_in_one_line_and_only_where_something_follows_r(tiny, tmp_path, bare, capsys):
    """A replayed r that jumps at step 20: two lines, at the probe steps 16 and 21; none from a recipe that follows nothing."""
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"step": k, "r": 0.0 if k < 20 else 0.95}) + "\n" for k in range(1, 33)))
    train.train({**tiny, "steps": 32, "eval_every": 32, "regime": f"replay:{tmp_path / 'r.jsonl'}", "out": str(tmp_path / "a")})
    said = re.findall(r"step (\d+): r = ([\d.]+) \((\w+)\), guidance (at [\d.]+|off), sampler centre t = ([\d.]+)", capsys.readouterr().out)
    assert said == [("16", "0.00", "acquires", "at 0.50", "0.88"), ("21", "0.95", "refines", "off", "0.82")]
    train.train({**tiny, "steps": 32, "eval_every": 32, "recipe": "static", "out": str(tmp_path / "b")})
    assert "sampler centre" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["data.py", "model.py", "sampler.py", "regime.py", "guidance.py", "structure_reg.py"])
def test_concept_demos_run(script):
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 5, done.stderr


def test_modules_speak_of_concepts_and_never_of_each_other():
    """The four concept files import no project file at their top; model.py knows neither data nor training."""
    imports = lambda f: set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f).read_text(), re.MULTILINE))
    ours = {p.stem for p in Path(ROOT).glob("*.py")}
    for name in ("regime.py", "guidance.py", "sampler.py", "structure_reg.py", "model.py", "data.py"):
        assert not imports(name) & ours, name


@pytest.mark.slow
def test_a_compiled_checkpointed_accumulated_run_passes_its_first_full_probe_with_guidance_on(tiny, tmp_path, bare):
    """At step 16 the two losses' gradients are compared, which a compiled backward pass does not allow: it must not be asked."""
    run = train.train({**tiny, "steps": 18, "eval_every": 18, "compile": True, "checkpointing": True, "accumulate": 2, "out": str(tmp_path / "r")})
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any(r["step"] == 16 and r["lambda"] > 0 for r in rows) and all(np.isfinite(r["loss"]) for r in rows if "loss" in r)
