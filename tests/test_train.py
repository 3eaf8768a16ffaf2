"""Claims about the training loop and its command line."""
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, training_alone
from folders import make_folder
from run_files import final, log_of, same_weights, step_rows

import data
import evaluate
import guidance
import model
import regime
import sampler
import structure_reg
import train
from parts import latents, soundworld
from parts.codec import Codec
from parts.config import Config
from parts.errors import UserError
from parts.soundworld import SoundWorld
from parts.text import Words

# --- a run

def test_a_run_folder_holds_what_tools_expect(t2a_run, sr_run):
    files = {"config.json", "log.jsonl", "checkpoint.pt", "samples", "dashboard.png", "scores.json"}
    keys = {"step", "loss", "loss_fm", "loss_ssl", "loss_struct", "lambda", "mu", "m", "r", "struct_active",
            "t_drawn", "lr", "grad_norm", "step_s"}
    for run in (t2a_run, sr_run):
        assert files <= {path.name for path in run.iterdir()}
        assert list((run / "samples").glob("*.wav")) and list((run / "samples").glob("*.png"))
        assert all(set(row) == keys for row in step_rows(run))
        evals = [row for row in log_of(run) if "eval" in row]
        assert [row["step"] for row in evals] == [6, 12]
        assert len(evals[0]["eval"]["val_loss_t"]) == 10
        settings = json.loads((run / "config.json").read_text())
        assert set(settings) == {field.name for field in dataclasses.fields(Config)}


def test_training_beats_the_constant_predictor(tiny, tmp_path, bare):
    """v = 0 costs E|v|^2; after 60 steps of a tiny network the held-out loss is clearly lower at every noise
    level."""
    run = train.train({**tiny, "task": "t2a", "out": str(tmp_path / "r"), "steps": 60, "eval_every": 60,
                       "lr": 4e-3, "width": 64})
    by_t = log_of(run)[-1]["eval"]["val_loss_t"]
    world = SoundWorld("val", 256)
    waves = torch.as_tensor(np.stack([world.wave(i) for i in range(64)]))
    variance = float(evaluate.load_run(run).codec.encode(waves).square().mean())
    assert np.mean(by_t) < 0.8 * (1 + variance) and all(x < 1 + variance for x in by_t)


def test_resuming_equals_never_having_stopped(tiny, t2a_run, tmp_path, bare):
    """6 steps, then 6 more, bitwise equal to 12; also checks that --resume can extend a finished run."""
    half = train.train({**tiny, "task": "t2a", "out": str(tmp_path / "half"), "steps": 6})
    train.train({"steps": 12}, str(half))
    assert same_weights(final(half), final(t2a_run)) and final(half)["step"] == 12
    steps = [row["step"] for row in step_rows(half)]
    assert steps == sorted(set(steps))


def test_previews_come_from_the_average_in_eval_mode(t2a_run):
    run, checkpoint = evaluate.load_run(t2a_run), final(t2a_run)
    assert torch.equal(run.model.state_dict()["head.weight"], checkpoint["ema"]["head.weight"])
    assert not torch.equal(checkpoint["ema"]["head.weight"], checkpoint["model"]["head.weight"])
    assert not run.model.training
    run.model.train()
    with pytest.raises(AssertionError, match="eval mode"):
        evaluate.preview(run, SoundWorld("val", 4))


def test_a_second_run_reuses_the_caches(tiny, t2a_run, tmp_path, monkeypatch):
    def refuse(*a):
        raise RuntimeError("rendered again")

    monkeypatch.setattr(soundworld, "_render_chunk", refuse)
    monkeypatch.setattr(latents, "_encode_chunk", refuse)
    train.train({**tiny, "task": "t2a", "out": str(tmp_path / "again"), "steps": 1})
    with pytest.raises(RuntimeError, match="rendered again"):  # negative control: other clips
        train.train({**tiny, "task": "t2a", "out": str(tmp_path / "more"), "steps": 1, "clips": 101})


def test_own_recordings_train_both_tasks(tiny, tmp_path):
    names = [f"audio/{k}.flac" for k in range(24)]
    rows = [(name, f"tone number {k}", 1 + k % 3) for k, name in enumerate(names)]
    folder = make_folder(tmp_path / "mine", names, rows, ("file_name", "caption", "fold"))
    for task in ("t2a", "sr"):
        run = train.train({**tiny, "task": task, "data": str(folder), "val_fold": 2, "steps": 2,
                           "eval_every": 2, "seconds": 1.28, "out": str(tmp_path / task)})
        assert (run / "dashboard.png").exists() and (run / "scores.json").exists()


# --- the mechanisms: off, on, and driven

def plain_loop(tiny: dict, steps: int, task: str) -> dict:
    """What training is without any mechanism, written down again: data, one loss, one optimizer, an average.
    -> weights."""
    # Data: clips, the codec, latents, captions.
    world = SoundWorld("train", tiny["clips"]).prepare(0)
    some = np.random.default_rng(0).permutation(len(world))[:500]
    codec = Codec(tiny["channels"]).fit(world.wave(i)[: 10 * 16_000] for i in some)
    z, muffled = data.LatentCache(world, codec), None
    if task == "sr":
        muffled = data.LatentCache(world, codec, tiny["variants"], 0)
    captions = [[world.caption(i, k) for k in range(4)] for i in range(len(world))]
    words = Words.fit(caption for wordings in captions for caption in wordings)

    # Network, average, optimizer.
    torch.manual_seed(0)
    vocabulary = len(words) if task == "t2a" else 0
    net = model.DiT(tiny["channels"], tiny["width"], tiny["depth"], tiny["heads"], vocabulary, task == "sr")
    average = {name: weight.clone() for name, weight in net.state_dict().items()}
    adam = torch.optim.AdamW(net.parameters(), 2e-3, (0.9, 0.99), weight_decay=0.01, fused=True)

    for step in range(1, steps + 1):
        adam.param_groups[0]["lr"] = 2e-3 * min(1, step / tiny["warmup"])
        generator = torch.Generator().manual_seed(step)
        batch = data.draw_batch(z, muffled, tiny["batch"], 64, np.random.default_rng([0, 1, step]))
        x0 = torch.from_numpy(batch["x0"])
        eps = torch.randn(x0.shape, generator=generator)
        t = sampler.sample(len(x0), 0.0, 1.0, generator=generator)
        drop = torch.rand(len(x0), generator=generator) < 0.1
        x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * eps
        if task == "t2a":
            chosen = zip(batch["i"], batch["wording"])
            ids = [words.encode([captions[i][k % 4]])[0] for i, k in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            v_hat = net(x_t, t, net.encode_text(ids, drop))
        else:
            v_hat = net(x_t, t, None, torch.from_numpy(batch["cond"]), None, drop)
        loss = (v_hat - (eps - x0)).square().mean(-1).mean(1).mean()
        net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        for name, weight in net.state_dict().items():
            average[name].lerp_(weight, 1 - min(0.9999, (1 + step) / (10 + step)))
    return {"model": net.state_dict(), "ema": average}


@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_off_is_bitwise_a_plain_loop(tiny, tmp_path, task, bare):
    """All mechanisms off, 20 steps, with and without probes: the parameters of an independent loop. Negative
    control: one more step."""
    plain = plain_loop(tiny, 20, task)
    settings = {**tiny, "task": task, "recipe": "vanilla", "optimizer": "adamw", "steps": 20,
                "eval_every": 20}
    for probe in ("auto", "always"):
        run = train.train({**settings, "probe": probe, "out": str(tmp_path / probe)})
        assert same_weights(plain, final(run))
    assert not same_weights(plain, plain_loop(tiny, 21, task))


def test_a_mechanism_draws_nothing_from_the_others(tiny, tmp_path, bare):
    """With learning rates too small to move a weight, the flow-matching losses of all steps are equal
    whatever is switched on (and the timesteps have equal ends), so data, noise, t and initial weights are.
    Negative control: another centre."""
    still = {**tiny, "task": "t2a", "steps": 20, "eval_every": 20, "lr": 1e-30, "muon_lr": 1e-30,
             "weight_decay": 0.0, "probe": "never", "regime": "clock", "timesteps": "constant",
             "m_late": 0.5, "m_early": 0.5, "guidance": "off", "structure": "off"}
    arms = {"off": {}, "guidance": {"guidance": "constant"}, "structure": {"structure": "constant"},
            "timesteps": {"timesteps": "adaptive"}, "another": {"m_late": 1.5}}
    fm = {}
    for name, arm in arms.items():
        run = train.train({**still, **arm, "out": str(tmp_path / name)})
        fm[name] = [row["loss_fm"] for row in step_rows(run)]
    assert len(fm["off"]) >= 2
    for name in ("guidance", "structure", "timesteps"):
        assert np.allclose(fm[name], fm["off"], atol=1e-6), name
    assert not np.allclose(fm["another"], fm["off"], atol=1e-3)


def test_each_mechanism_trains_something_else(tiny, tmp_path, bare):
    """Negative control of the neutral elements: switched on, each one changes the weights."""
    settings = {**tiny, "task": "sr", "steps": 8, "eval_every": 8, "recipe": "vanilla"}
    arms = [{}, {"guidance": "constant"}, {"timesteps": "constant"}, {"structure": "constant"},
            {"structure": "constant", "struct_loss": "dispersive"}]
    weights = [final(train.train({**settings, **arm, "out": str(tmp_path / str(k))}))
               for k, arm in enumerate(arms)]
    assert not any(same_weights(a, b) for k, a in enumerate(weights) for b in weights[:k])


@pytest.fixture(scope="module")
def staged(tiny, tmp_path_factory):
    """40 steps of `stage`: probes from step 16 on, every mechanism adaptive, four blocks."""
    settings = {**tiny, "task": "t2a", "recipe": "stage", "steps": 40, "eval_every": 20, "depth": 4}
    with pytest.MonkeyPatch.context() as patch:
        training_alone(patch)
        return settings, train.train({**settings, "out": str(tmp_path_factory.mktemp("stage") / "r")})


def test_the_log_holds_the_regime_and_what_it_drives(staged):
    rows = step_rows(staged[1])
    probes = [row for row in rows if "D" in row]
    assert [row["step"] for row in probes] == regime.probe_steps(40)
    assert set(probes[0]["D_t"]) == {"1.0", "0.9", "0.7", "0.5"} and set(probes[1]["D_t"]) == {"1.0"}
    assert "D_shuffled" in probes[0] and "slope" in probes[-1]
    assert any("structure" in row for row in rows) and any("agreement" in row for row in rows)
    for row in rows:
        assert 0 <= row["r"] <= 1
        assert abs(row["lambda"] - guidance.ssl_weight(row["r"], 0.5)) < 1e-9
        assert abs(row["m"] - sampler.centre(row["r"], 2.0, 1.5)) < 1e-9
        total = row["loss_fm"] + row["lambda"] * row["loss_ssl"] + row["mu"] * row["loss_struct"]
        assert abs(row["loss"] - total) < 1e-4


def test_the_clock_is_the_stage_fed_with_its_r(staged, tmp_path, bare):
    """`--regime clock` and a replay of r = k / K: bitwise the same run. Negative control: a replay of another
    r."""
    settings, _ = staged
    clock_rows = [json.dumps({"step": k, "r": k / 40}) for k in range(1, 41)]
    (tmp_path / "clock.jsonl").write_text("\n".join(clock_rows) + "\n")
    (tmp_path / "half.jsonl").write_text(json.dumps({"step": 1, "r": 0.5}) + "\n")
    arms = ({"recipe": "clock"}, {"regime": f"replay:{tmp_path / 'clock.jsonl'}"},
            {"regime": f"replay:{tmp_path / 'half.jsonl'}"})
    clock, replay, half = (final(train.train({**settings, **arm, "out": str(tmp_path / str(k))}))
                           for k, arm in enumerate(arms))
    assert same_weights(clock, replay) and not same_weights(clock, half)


def test_a_replay_of_its_own_log_repeats_a_run(staged, tmp_path, bare):
    """What the log says drove each step is what drove it."""
    settings, run = staged
    again = train.train({**settings, "regime": f"replay:{run / 'log.jsonl'}", "out": str(tmp_path / "r")})
    assert same_weights(final(run), final(again))


def without_times(rows: list[dict]) -> list[dict]:
    """What a log holds besides clocks, memory and evaluations."""
    return [{key: value for key, value in row.items() if key not in ("step_s", "eval", "memory_mb")}
            for row in rows]


def test_a_stopped_stage_run_goes_on_exactly(staged, tmp_path, monkeypatch, bare):
    """SIGTERM at step 20 of 40, resumed: weights, r, lambda, groups and all that is logged are those of the
    straight run."""
    settings, run = staged
    monkeypatch.setattr(evaluate, "preview", lambda *a: signal.raise_signal(signal.SIGTERM) or {})
    with pytest.raises(UserError, match="stopped at step 20"):
        train.train({**settings, "out": str(tmp_path / "r")})
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    train.train({}, str(tmp_path / "r"))
    straight, resumed = final(run), final(tmp_path / "r")
    assert same_weights(straight, resumed)
    assert without_times(log_of(run)) == without_times(log_of(tmp_path / "r"))
    assert straight["regime"]["D"] == resumed["regime"]["D"]
    assert straight["structure"]["groups"] == resumed["structure"]["groups"]
    pairs = zip(straight["projector"].values(), resumed["projector"].values())
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("how", [
    {"regime": "loss"}, {"regime_signal": "levels"}, {"regime_signal": "ratio"}, {"regime_signal": "latent"},
    {"recipe": "stop", "stop_at": 0.5},
])
def test_other_sources_signals_and_the_one_shot_end(tiny, tmp_path, how, bare):
    settings = {**tiny, "task": "sr", "steps": 40, "eval_every": 40, "out": str(tmp_path / "r")}
    rows = step_rows(train.train({**settings, **how}))
    if "recipe" in how:
        assert all((row["lambda"] > 0) == (row["step"] <= 20) for row in rows)
        assert not any("D" in row for row in rows)
    elif "regime" in how:
        assert not any("D" in row for row in rows) and any("slope" in row for row in rows)
    else:
        probe = next(row for row in rows if "D" in row)
        by_t = probe["D_t"]
        expected = {"levels": np.mean([by_t[t] for t in ("0.9", "0.7", "0.5")]),
                    "ratio": by_t["1.0"] / probe["D_shuffled"], "latent": by_t["1.0"]}
        assert abs(probe["D"] - expected[how["regime_signal"]]) < 1e-9


def test_guidance_costs_nothing_after_it_has_decayed(tiny, tmp_path, monkeypatch, bare):
    """r = 0.95 throughout: neither the features are read nor the loss computed. Negative control: at r = 0.5
    they are."""
    def refuse(*a):
        raise RuntimeError("computed")

    monkeypatch.setattr(guidance, "alignment_loss", refuse)
    for r in (0.95, 0.5):
        (tmp_path / f"{r}.jsonl").write_text(json.dumps({"step": 1, "r": r}) + "\n")
    settings = {**tiny, "task": "sr", "steps": 4, "eval_every": 4}
    decayed, strong = (f"replay:{tmp_path / name}" for name in ("0.95.jsonl", "0.5.jsonl"))
    train.train({**settings, "regime": decayed, "out": str(tmp_path / "a")})
    with pytest.raises(RuntimeError, match="computed"):
        train.train({**settings, "regime": strong, "out": str(tmp_path / "b")})


def test_negative_control_a_regime_turned_round_drives_everything_the_other_way():
    """drive: r up means lambda down, m towards its late value, mu up; with 1 - r for r each of these claims
    fails."""
    cfg, detector = Config(steps=100), structure_reg.GroupDetector(8)
    detector.activated_at, detector.groups = 0, [0, 0, 0, 1, 1, 1, 2, 2]

    def claims(early, late):
        lam_0, m_0, mu_0, _ = train.drive(cfg, early, 50, detector)
        lam_1, m_1, mu_1, groups = train.drive(cfg, late, 50, detector)
        return lam_0 > lam_1, m_0 > m_1, mu_0 < mu_1 and groups == detector.groups

    assert all(claims(0.1, 0.8)) and not any(claims(1 - 0.1, 1 - 0.8))


def test_constant_structure_keeps_its_groups_by_depth_whatever_is_found_meanwhile():
    detector = structure_reg.GroupDetector(8)
    detector.activated_at, detector.groups = 0, [0, 1, 0, 1, 0, 1, 2, 2]
    by_depth = structure_reg.depth_groups(8, detector.G)
    for mode, groups in (("constant", by_depth), ("adaptive", detector.groups)):
        assert train.drive(Config(steps=100, depth=8, structure=mode), 0.8, 50, detector)[3] == groups


def test_the_profile_accounts_for_all_of_the_time(tiny, tmp_path, capsys, bare):
    train.train({**tiny, "task": "sr", "steps": 20, "eval_every": 20, "profile": True,
                 "out": str(tmp_path / "r")})
    row = re.compile(r"^(\w[\w ]*?)\s+([\d.]+)\s+([\d.]+) %$", re.MULTILINE)
    table = row.findall(capsys.readouterr().out)
    assert {name for name, *_ in table} == {"data", "forward", "backward", "optimizer", "EMA", "probe",
                                            "guidance", "structure", "log and evaluation"}
    assert abs(sum(float(share) for *_, share in table) - 100) < 1


# --- command line

def test_terminated_runs_save_and_say_how_to_continue(tiny, tmp_path):
    """SIGTERM between evaluations: the step is finished and saved; resumed, it ends bitwise like a run that
    was left alone."""
    # Not an adaptive recipe: those know how many steps are planned.
    settings = {**tiny, "task": "sr", "recipe": "static", "steps": 400, "eval_every": 1_000}
    flags = []
    for name, value in {**settings, "out": tmp_path / "r"}.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    command = [sys.executable, ROOT / "train.py", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "r" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 1:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    step = final(tmp_path / "r")["step"]
    assert process.returncode == 2 and 10 <= step < 400
    assert f"continue with: python train.py --resume {tmp_path / 'r'}" in err
    train.train({"steps": step + 3}, str(tmp_path / "r"))
    straight = train.train({**settings, "steps": step + 3, "out": str(tmp_path / "straight")})
    assert same_weights(final(tmp_path / "r"), final(straight))


def test_each_change_of_phase_is_said_in_one_line_and_only_where_something_follows_r(
        tiny, tmp_path, bare, capsys):
    """A replayed r that jumps at step 20: two lines, at the probe steps 16 and 21; none from a recipe that
    follows nothing."""
    rows = [json.dumps({"step": k, "r": 0.0 if k < 20 else 0.95}) for k in range(1, 33)]
    (tmp_path / "r.jsonl").write_text("\n".join(rows) + "\n")
    settings = {**tiny, "steps": 32, "eval_every": 32}
    train.train({**settings, "regime": f"replay:{tmp_path / 'r.jsonl'}", "out": str(tmp_path / "a")})
    line = (r"step (\d+): r = ([\d.]+) \((\w+)\), guidance (at [\d.]+|off), "
            r"sampler centre t = ([\d.]+)")
    said = re.findall(line, capsys.readouterr().out)
    assert said == [("16", "0.00", "acquires", "at 0.50", "0.88"), ("21", "0.95", "refines", "off", "0.82")]
    train.train({**settings, "recipe": "static", "out": str(tmp_path / "b")})
    assert "sampler centre" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["data.py", "model.py", "sampler.py", "regime.py", "guidance.py",
                                    "structure_reg.py"])
def test_concept_demos_run(script):
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 5, done.stderr


@pytest.mark.slow
def test_a_compiled_checkpointed_accumulated_run_passes_its_first_full_probe_with_guidance_on(
        tiny, tmp_path, bare):
    """At step 16 the two losses' gradients are compared, which a compiled backward pass does not allow: it
    must not be asked."""
    run = train.train({**tiny, "steps": 18, "eval_every": 18, "compile": True, "checkpointing": True,
                       "accumulate": 2, "out": str(tmp_path / "r")})
    rows = step_rows(run)
    assert any(row["step"] == 16 and row["lambda"] > 0 for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows)
