"""Claims about the training loop and its command line."""
import dataclasses
import json
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, made_once, training_alone
from folders import make_folder
from run_files import distance, final, log_of, same_weights, step_rows, until

import data
import evaluate
import guidance
import model
import regime
import sampler
import structure_reg
import train
from parts import config, latents, peers, runs, soundworld
from parts.audio import ACTIVE_RMS, at_level
from parts.codec import Codec
from parts.config import Config
from parts.devices import Timer
from parts.errors import UserError
from parts.soundworld import SoundWorld
from parts.text import Words

# --- a run

def test_a_run_folder_holds_what_tools_expect(t2a_run, sr_run):
    files = {"config.json", "log.jsonl", "checkpoint.pt", "samples", "dashboard.png", "scores.json"}
    keys = {"step", "loss", "loss_fm", "loss_ssl", "loss_struct", "lambda", "mu", "density", "r",
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


def test_training_lowers_the_held_out_loss_where_it_draws_its_noise_levels(tiny, tmp_path, bare):
    """Below that of a fresh network, which is about the answer for N(0, 1) data: as many steps at no rate."""
    by_t = {}
    for scale in (1.0, 1e-9):
        run = train.train({**tiny, "out": str(tmp_path / str(scale)), "steps": 60, "eval_every": 60,
                           "lr": 4e-3 * scale, "muon_lr": 5e-3 * scale, "width": 64})
        by_t[scale] = np.array(log_of(run)[-1]["eval"]["val_loss_t"])
    t = (np.arange(10) + 0.5) / 10
    assert by_t[1e-9] == pytest.approx(1 / ((1 - t) ** 2 + t**2), rel=0.3)
    assert (by_t[1.0] < 0.95 * by_t[1e-9])[4:].all(), by_t


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
    clips = [world.wave(i)[: 10 * 16_000] for i in some]
    codec = Codec(tiny["channels"]).fit(at_level(np.stack(clips), ACTIVE_RMS)[0] if task == "sr" else clips)
    z, muffled = data.LatentCache(world, codec), None
    if task == "sr":
        muffled = data.LatentCache(world, codec, tiny["variants"], 0)
    else:
        z.p = world.p_by_events()
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
        t = sampler.LogitNormal().sample(len(x0), generator)
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
    """All mechanisms off, 40 steps, with and without probes: the parameters of an independent loop. Negative
    control: one more step."""
    plain = plain_loop(tiny, 40, task)
    settings = {**tiny, "task": task, "recipe": "vanilla", "optimizer": "adamw", "steps": 40,
                "eval_every": 40}
    for probe, probes in (("auto", []), ("always", [32, 38])):
        run = train.train({**settings, "probe": probe, "out": str(tmp_path / probe)})
        assert same_weights(plain, final(run))
        assert [row["step"] for row in step_rows(run) if "D" in row] == probes
        assert not any({"agreement", "struct_share"} & set(row) for row in step_rows(run))
    assert not same_weights(plain, plain_loop(tiny, 41, task))


def test_a_mechanism_draws_nothing_from_the_others(tiny, tmp_path, monkeypatch, bare):
    """With learning rates too small to move a weight, the flow-matching losses of all steps are equal
    whatever is switched on (and the timesteps have equal ends), so data, noise, t and initial weights are.
    Negative controls: another centre, another width."""
    monkeypatch.setattr(peers, "BINS", 1_000)  # never all drawn: infonoise keeps its first density
    still = {**tiny, "task": "t2a", "steps": 20, "eval_every": 20, "lr": 1e-30, "muon_lr": 1e-30,
             "weight_decay": 0.0, "probe": "never", "regime": "clock", "timesteps": "constant",
             "m": 0.5, "m_late": 0.5, "m_early": 0.5, "guidance": "off", "structure": "off"}
    by_loss = {loss: {"structure": "constant", "struct_loss": loss} for loss in train.STRUCT_LOSSES}
    arms = {"off": {}, "guidance": {"guidance": "constant"}, **by_loss,
            "timesteps": {"timesteps": "adaptive"}, "infonoise": {"timesteps": "infonoise"},
            "centre": {"m": 1.5}, "width": {"s": 2.0}}
    fm = {}
    for name, arm in arms.items():
        run = train.train({**still, **arm, "out": str(tmp_path / name)})
        fm[name] = [row["loss_fm"] for row in step_rows(run)]
    for name in ("centre", "width"):
        assert not np.allclose(fm.pop(name), fm["off"], atol=1e-3), name
    for name, losses in fm.items():
        assert len(losses) >= 2 and np.allclose(losses, fm["off"], atol=1e-6), name


def test_each_mechanism_trains_something_else(tiny, tmp_path, bare):
    """Negative control of the neutral elements: switched on, each one changes the weights, a structure
    loss once its share has been measured at the first probe step."""
    settings = {**tiny, "task": "sr", "steps": 36, "eval_every": 36, "recipe": "vanilla"}
    arms = [{}, {"guidance": "constant"}, {"timesteps": "constant"}, {"timesteps": "curriculum"},
            *({"structure": "constant", "struct_loss": loss} for loss in train.STRUCT_LOSSES)]
    weights = [final(train.train({**settings, **arm, "out": str(tmp_path / str(k))}))
               for k, arm in enumerate(arms)]
    assert not any(same_weights(a, b) for k, a in enumerate(weights) for b in weights[:k])


def test_a_batch_in_parts_gives_the_gradient_and_the_observations_of_the_whole(tiny, tmp_path, bare):
    """With guidance, and with what a peer keeps of each loss. Negative control: one part alone."""
    settings = {**tiny, "task": "sr", "recipe": "infonoise", "steps": 6, "eval_every": 6}
    arms = {"whole": {}, "parts": {"accumulate": 4}, "one part": {"batch": 2}}
    ends = {name: final(train.train({**settings, **arm, "out": str(tmp_path / name)}))
            for name, arm in arms.items()}
    whole, parts, one_part = ends.values()
    assert distance(parts["model"], whole["model"]) < 1e-3
    assert distance(one_part["model"], whole["model"]) > 1e-2
    sums, of_parts, of_one = (end["infonoise"]["sums"] for end in ends.values())
    assert torch.allclose(of_parts, sums, rtol=1e-4) and not torch.allclose(of_one, sums, rtol=0.1)


def shares_of_structure(settings: dict) -> dict:
    """{step: the structure loss's measured share of the gradient} of a run."""
    rows = step_rows(train.train(settings))
    assert all((row["mu"] > 0) == (settings["structure"] != "off" and row["step"] > 32) for row in rows)
    return {row["step"]: row["struct_share"] for row in rows if "struct_share" in row}


@pytest.mark.parametrize("task", [pytest.param("t2a", marks=pytest.mark.slow), "sr"])
def test_the_structure_loss_gets_its_share_of_the_gradient_where_it_is_constant(
        tiny, tmp_path, monkeypatch, task, bare):
    """Measured at each probe step, and near the 0.15 that was asked for: the weight follows the
    gradients of earlier batches. Negative controls: off, nothing is measured; a weight that takes the
    loss's gradient for twenty times as large gives it too little."""
    settings = {**tiny, "task": task, "recipe": "static", "steps": 80, "eval_every": 80, "depth": 4,
                "structure": "constant"}
    found = shares_of_structure({**settings, "out": str(tmp_path / "r")})
    assert list(found) == regime.probe_steps(80) and found[32] == 0, "its weight is not known yet"
    assert all(0.02 < share < 0.5 for step, share in found.items() if step > 32), found
    settled = {row["mu"] for row in step_rows(tmp_path / "r") if row["step"] > 64}
    assert len(settled) == 1 and settled != {0.0}, "once it has set in the weight stays"
    off = {"structure": "off", "steps": 34, "eval_every": 34}
    assert shares_of_structure({**settings, **off, "out": str(tmp_path / "off")}) == {}
    take = structure_reg.GroupDetector.take_ratio
    monkeypatch.setattr(structure_reg.GroupDetector, "take_ratio", lambda self, x: take(self, 20 * x))
    too_little = shares_of_structure({**settings, "out": str(tmp_path / "little")})
    assert sum(too_little.values()) < 0.25 * sum(found.values())


STAGED = 100  # steps of the staged run: seven probes, the last of them with a slope


@pytest.fixture(scope="module")
def staged(tiny):
    """A run of `stage` that measures all there is, every mechanism adaptive, six blocks."""
    settings = {**tiny, "task": "t2a", "recipe": "stage", "steps": STAGED, "eval_every": STAGED // 2,
                "depth": 6, "probe": "always", "cool": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        training_alone(patch)
        return settings, made_once("staged", settings)


def test_the_log_holds_the_regime_and_what_it_drives(staged):
    rows, cfg = step_rows(staged[1]), Config()
    early = sampler.LogitNormal(cfg.m_early, cfg.s_early)
    late = sampler.LogitNormal(cfg.m_late, cfg.s_late)
    probes = [row for row in rows if "D" in row]
    assert [row["step"] for row in probes] == regime.probe_steps(STAGED)
    assert "slope" in probes[-1] and "slope" not in probes[0]
    assert any("structure" in row for row in probes) and len({row["r"] for row in rows}) >= 3
    for row in probes:
        levels = [row["D_of"][name] for name in ("t0.9", "t0.7", "t0.5")]
        assert row["D"] == pytest.approx(np.mean(levels))
    for row in rows:
        assert 0 <= row["r"] <= 1
        assert abs(row["lambda"] - guidance.ssl_weight(row["r"], 0.5)) < 1e-9
        assert sampler.LogitNormal(**row["density"]) == sampler.between(row["r"], early, late)
        total = row["loss_fm"] + row["lambda"] * row["loss_ssl"] + row["mu"] * row["loss_struct"]
        assert abs(row["loss"] - total) < 1e-4


def test_a_run_that_always_probes_measures_every_discrepancy_and_agreement_by_noise_level(staged):
    """The discrepancies at each probe, the agreement at every second one, while there is guidance."""
    probes = [row for row in step_rows(staged[1]) if "D" in row]
    names = {name + how for name in regime.PREDICTIONS for how in ("", "-pooled")}
    assert all(set(row["D_of"]) == names for row in probes)
    guided = [row["step"] for row in probes[::2] if row["lambda"] > 0]
    assert guided[:3] == [32, 45, 64]
    for what in ("agreement", "agreement_t"):
        assert [row["step"] for row in step_rows(staged[1]) if what in row] == guided
    for by_t in (row["agreement_t"] for row in probes if "agreement_t" in row):
        assert list(by_t) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
        assert all(-1 <= cosine <= 1 for cosine in by_t.values()) and len(set(by_t.values())) == 5


def test_the_clock_is_the_stage_fed_with_its_r(tiny, tmp_path, bare):
    """`--regime clock` and a replay of r = k / K: bitwise the same run, also after the blocks' groups were
    tested at step 32. Negative control: a replay of another r."""
    settings = {**tiny, "task": "t2a", "recipe": "stage", "depth": 6, "steps": 40, "eval_every": 40}
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
    log = f"replay:{run / 'log.jsonl'}"
    again = train.train({**settings, "regime": log, "probe": "auto", "out": str(tmp_path / "r")})
    assert same_weights(final(run), final(again))


def test_the_log_tells_r_of_every_step_where_it_is_measured_in_it(tiny, tmp_path, monkeypatch, bare):
    """Agreement is measured after r was read; what a replay of the log takes for r is what drove each
    step."""
    driven, drive, cosines = {}, train.drive, iter([0.9, 0.8, 0.4, 0.2])
    monkeypatch.setattr(guidance, "gradient_agreement", lambda *a: next(cosines))

    def noted(cfg, r, k, *more):
        driven[k] = r
        return drive(cfg, r, k, *more)

    monkeypatch.setattr(train, "drive", noted)
    run = train.train({**tiny, "task": "t2a", "steps": 100, "eval_every": 100, "guidance": "constant",
                       "regime": "agreement", "out": str(tmp_path / "r")})
    steps, r = regime.read_r(run / "log.jsonl")
    assert {k: float(regime.hold_last(steps, r, k)) for k in driven} == driven
    moved = [k for k in range(2, 101) if driven[k] != driven[k - 1]]
    assert moved and moved[0] % 10 > 1, "between two tenth steps"


def without_times(rows: list[dict]) -> list[dict]:
    """What a log holds besides clocks, memory and evaluations."""
    return [{key: value for key, value in row.items() if key not in ("step_s", "eval", "memory_mb")}
            for row in rows]


def test_a_stopped_stage_run_goes_on_exactly(staged, tmp_path, monkeypatch, bare):
    """SIGTERM halfway, and again while the checkpoint is written; resumed: weights, r, lambda, groups and all
    that is logged are those of the straight run."""
    settings, run = staged
    save_run = train.save_run

    def interrupted(*a):
        signal.raise_signal(signal.SIGTERM)
        save_run(*a)
    monkeypatch.setattr(train, "save_run", interrupted)
    monkeypatch.setattr(evaluate, "preview", lambda *a: signal.raise_signal(signal.SIGTERM) or {})
    with pytest.raises(UserError, match=f"stopped at step {STAGED // 2}"):
        train.train({**settings, "out": str(tmp_path / "r")})
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    monkeypatch.setattr(train, "save_run", save_run)
    train.train({}, str(tmp_path / "r"))
    straight, resumed = final(run), final(tmp_path / "r")
    assert same_weights(straight, resumed)
    assert without_times(log_of(run)) == without_times(log_of(tmp_path / "r"))
    assert straight["regime"]["D"] == resumed["regime"]["D"]
    for name in ("groups", "labels", "streak", "checks", "ratio"):
        assert straight["structure"][name] == resumed["structure"][name]
    pairs = zip(straight["projector"].values(), resumed["projector"].values())
    assert all(torch.equal(x, y) for x, y in pairs)


def test_a_peer_that_follows_its_loss_resumes_exactly(tiny, tmp_path, monkeypatch, bare):
    """Three bins, all drawn within ten steps: its density has left the first one. Negative control: a
    run that forgets what was observed."""
    monkeypatch.setattr(peers, "BINS", 3)
    settings = {**tiny, "task": "t2a", "recipe": "infonoise", "eval_every": 14}
    straight = train.train({**settings, "steps": 28, "out": str(tmp_path / "straight")})
    kinds = {row["step"]: set(row["density"]) for row in step_rows(straight)}
    assert kinds == {10: {"m", "s", "u"}, 20: {"shares", "u"}, 28: {"shares", "u"}}
    load_state = peers.InfoNoise.load_state_dict
    for name, load in (("resumed", load_state), ("forgetful", lambda self, state: None)):
        train.train({**settings, "steps": 14, "out": str(tmp_path / name)})
        monkeypatch.setattr(peers.InfoNoise, "load_state_dict", load)
        train.train({"steps": 28}, str(tmp_path / name))
    resumed, forgetful = final(tmp_path / "resumed"), final(tmp_path / "forgetful")
    assert same_weights(resumed, final(straight)) and not same_weights(forgetful, final(straight))
    assert torch.equal(resumed["infonoise"]["sums"], final(straight)["infonoise"]["sums"])
    assert resumed["infonoise"]["shares"] == final(straight)["infonoise"]["shares"]


def test_a_peer_is_shown_the_timestep_and_the_loss_of_each_clip(tiny, tmp_path, monkeypatch, bare):
    shown, right = [], peers.InfoNoise.observe

    def observe(self, t, loss, k):
        shown.append((k, t, loss))
        right(self, t, loss, k)

    monkeypatch.setattr(peers.InfoNoise, "observe", observe)
    run = train.train({**tiny, "task": "sr", "recipe": "infonoise", "out": str(tmp_path / "r")})
    assert [k for k, *_ in shown] == list(range(1, 13))
    assert all(len(t) == len(loss) == tiny["batch"] for _, t, loss in shown)
    for row in step_rows(run):
        _, t, loss = shown[row["step"] - 1]
        assert float(t.mean()) == pytest.approx(row["t_drawn"])
        assert float(loss.mean()) == pytest.approx(row["loss_fm"], rel=1e-5)


def test_the_curriculum_is_uniform_in_its_second_half(tiny, tmp_path, bare):
    rows = step_rows(train.train({**tiny, "task": "sr", "recipe": "curriculum", "steps": 40,
                                  "eval_every": 40, "out": str(tmp_path / "r")}))
    found = {row["step"]: row["density"]["u"] for row in rows}
    assert found == {k: 0.1 if k <= 20 else 1.0 for k in found} and {20, 30} <= set(found)


@pytest.mark.parametrize("kind", ["sample", "t0.7-pooled", "levels-pooled", "latent"])
def test_the_signal_that_was_asked_for_is_the_mean_of_its_discrepancies_and_no_other_is_measured(
        tiny, tmp_path, kind, bare):
    rows = step_rows(train.train({**tiny, "task": "sr", "steps": 40, "eval_every": 40,
                                  "regime_signal": kind, "out": str(tmp_path / "r")}))
    probes = [row for row in rows if "D" in row]
    assert [row["step"] for row in probes] == [32, 38]
    alone = {"sample": ["sample"], "t0.7-pooled": ["t0.7"]}.get(kind, ["t0.9", "t0.7", "t0.5"])
    how = "-pooled" if kind.endswith("-pooled") else ""
    for row in probes:
        assert set(row["D_of"]) == {name + pooled for name in alone for pooled in ("", "-pooled")}
        assert row["D"] == pytest.approx(np.mean([row["D_of"][name + how] for name in alone]))


def test_the_averaged_network_is_what_is_probed_and_validated(tiny, tmp_path, monkeypatch, bare):
    """D by hand: of ten clips and their noise, in features less their mean. Negative controls: the network
    that is trained, and features that are not centred."""
    cfg = config.resolve({**tiny, "task": "sr", "out": str(tmp_path / "r")})
    run, k = train.prepare(cfg, None, "", lambda folder: None), 32
    with torch.no_grad():
        for p in run.networks.model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    run.step, batch = k, {name: x[:10] for name, x in run.val_batches[0].items()}

    def by_hand(net, mean):
        found = regime.probe(lambda x_t, t: net(x_t, t, None, batch["cond"]), run.data.extract, batch["x0"],
                             batch["eps"], mean=mean)
        return np.mean(list(found[name] for name in regime.LEVELS))
    found = train.measure(run, 0, Timer())["D"]
    assert found == pytest.approx(by_hand(run.networks.ema, run.data.phi_mean), rel=1e-5)
    assert found != pytest.approx(by_hand(run.networks.model, run.data.phi_mean), rel=1e-2)
    assert found != pytest.approx(by_hand(run.networks.ema, None), rel=1e-2)

    log = []
    monkeypatch.setattr(train, "save_run", lambda *a: None)
    train.evaluate_and_save(run, log.append, Timer())
    average, raw = (evaluate.validation_loss(net, run.val_batches)
                    for net in (run.networks.ema, run.networks.model))
    assert log[0]["eval"]["val_loss_t"] == average != raw


def test_the_proxy_without_a_teacher_can_be_probed_always_while_a_teacher_guides(tiny, tmp_path, bare):
    """The discrepancy is of latents, the agreement of what the teacher says."""
    rows = step_rows(train.train({**tiny, "task": "sr", "steps": 34, "eval_every": 34, "probe": "always",
                                  "regime_signal": "latent", "out": str(tmp_path / "r")}))
    assert [row["step"] for row in rows if "D" in row and "agreement_t" in row] == [32]


def test_a_discrepancy_that_is_not_finite_ends_a_run_in_one_line(tiny, tmp_path, bare, monkeypatch):
    monkeypatch.setattr(regime, "probe", lambda *a: dict.fromkeys(regime.PREDICTIONS, float("nan")))
    with pytest.raises(UserError, match="step 32: D is nan: a validation clip, or what the network makes"):
        train.train({**tiny, "task": "sr", "steps": 40, "out": str(tmp_path / "run")})


def test_the_loss_can_be_the_source_of_r(tiny, tmp_path, monkeypatch, bare):
    """In the place of D: the mean of flow matching's losses since the last probe, each clip's weighted to the
    reference density. A slope at each probe step from the first that has a whole window behind it."""
    observed, observe = [], regime.Regime.observe
    drawn, gradients = [], train.gradients

    def kept(run, j, driven, batch, timer):
        found = gradients(run, j, driven, batch, timer)
        drawn.append((batch["t"], found[1]))
        return found

    def noted(self, loss):
        observed.append(float(loss))
        observe(self, loss)
    monkeypatch.setattr(regime.Regime, "observe", noted)
    monkeypatch.setattr(train, "gradients", kept)
    run = train.train({**tiny, "task": "sr", "steps": 92, "eval_every": 92, "regime": "loss",
                       "out": str(tmp_path / "r")})
    rows, steps = step_rows(run), regime.probe_steps(92)
    assert not any("D" in row for row in rows)
    assert len(observed) == 92
    for row in rows:
        t, each = drawn[row["step"] - 1]
        reference, density = sampler.LogitNormal(), sampler.LogitNormal(**row["density"])
        weighted = float((each * reference.pdf(t) / density.pdf(t)).mean())
        assert observed[row["step"] - 1] == pytest.approx(weighted)
        assert row["loss_fm"] == pytest.approx(float(each.mean())) and density.m > 1
    since = zip([0, *(k - 1 for k in steps)], (k - 1 for k in steps))  # a probe comes before its own step
    assert final(run)["regime"]["D"] == pytest.approx([np.mean(observed[a:b]) for a, b in since])
    expected = steps[regime.WINDOW - 1:]
    assert len(expected) >= 2 and [row["step"] for row in rows if "slope" in row] == expected


def test_the_agreement_of_gradients_can_be_the_source_of_r(tiny, tmp_path, bare):
    """r = 1 - mean / largest mean, from the third cosine of the log on: the mean is a moving average in
    which the newest counts 0.6. Before, r = 0."""
    run = train.train({**tiny, "task": "sr", "steps": 100, "eval_every": 100, "regime": "agreement",
                       "out": str(tmp_path / "r")})
    rows = step_rows(run)
    cosines = {row["step"]: row["agreement"] for row in rows if "agreement" in row}
    assert list(cosines) == [32, 45, 64, 91] and not any("D" in row for row in rows)
    mean, largest, r = None, 0.0, {1: 0.0}
    for n, (k, cosine) in enumerate(cosines.items(), 1):
        mean = cosine if mean is None else 0.4 * mean + 0.6 * cosine
        if n >= 3:  # the step itself is driven by what was known before it
            largest = max(largest, mean)
            r[k + 1] = min(1.0, max(0.0, 1 - mean / largest)) if largest > 0 else 1.0
    for row in rows:
        assert row["r"] == pytest.approx(r[max(k for k in r if k <= row["step"])]), row["step"]


def test_guidance_can_end_all_at_once(tiny, tmp_path, bare):
    rows = step_rows(train.train({**tiny, "task": "sr", "recipe": "stop", "stop_at": 0.5, "steps": 40,
                                  "eval_every": 40, "out": str(tmp_path / "r")}))
    assert all((row["lambda"] > 0) == (row["step"] <= 20) for row in rows)
    assert not any("D" in row for row in rows)


def test_guidance_costs_nothing_after_it_has_decayed(tiny, tmp_path, monkeypatch, bare):
    """r = 0.95 throughout: neither the features are read nor the loss computed. Negative control: at r = 0.5
    they are."""
    read = data.Prefetcher.read

    def refuse(*a):
        raise RuntimeError("computed")

    def without_features(self, crops, with_phi):
        if with_phi:
            raise RuntimeError("read")
        return read(self, crops, with_phi)

    monkeypatch.setattr(guidance, "alignment_loss", refuse)
    monkeypatch.setattr(data.Prefetcher, "read", without_features)
    for r in (0.95, 0.5):
        (tmp_path / f"{r}.jsonl").write_text(json.dumps({"step": 1, "r": r}) + "\n")
    settings = {**tiny, "task": "sr", "steps": 4, "eval_every": 4}
    decayed, strong = (f"replay:{tmp_path / name}" for name in ("0.95.jsonl", "0.5.jsonl"))
    train.train({**settings, "regime": decayed, "out": str(tmp_path / "a")})
    with pytest.raises(RuntimeError, match="read"):
        train.train({**settings, "regime": strong, "out": str(tmp_path / "b")})
    monkeypatch.setattr(data.Prefetcher, "read", read)
    with pytest.raises(RuntimeError, match="computed"):
        train.train({**settings, "regime": strong, "out": str(tmp_path / "c")})


# --- evaluations

def evaluations_due(**settings) -> list[int]:
    """Steps after which a run is evaluated."""
    cfg = Config(**settings)
    stage = regime.Regime("slope", cfg.steps)
    return [k for k in range(1, cfg.steps + 1) if runs.evaluation_due(cfg, k, stage.probe_index(k))]


def test_evaluations_come_at_each_half_doubling_from_64_where_no_interval_is_given():
    """And at the end. Negative control: a given interval."""
    half_doublings = [round(64 * 2 ** (n / 2)) for n in range(12)]
    assert evaluations_due(steps=3_000, eval_every=0) == [*half_doublings, 3_000]
    assert evaluations_due(steps=4_096, eval_every=0)[-1] == 4_096
    assert evaluations_due(steps=50, eval_every=0) == [50]
    assert evaluations_due(steps=3_000, eval_every=1_400) == [1_400, 2_800, 3_000]


def test_a_run_without_an_interval_is_evaluated_and_saved_at_half_doublings(tiny, tmp_path, bare):
    run = train.train({**tiny, "task": "sr", "recipe": "vanilla", "steps": 70, "eval_every": 0,
                       "out": str(tmp_path / "r")})
    assert [row["step"] for row in log_of(run) if "eval" in row] == [64, 70]
    previous = torch.load(run / "checkpoint-previous.pt", weights_only=True)
    assert (previous["step"], final(run)["step"]) == (64, 70)


# --- time

def test_the_profile_accounts_for_all_of_the_time(tiny, tmp_path, capsys, monkeypatch, bare):
    """But for what lies between steps. By another clock around the loop."""
    loop, whole = train.loop, []

    def timed(run):
        began, timer = time.perf_counter(), loop(run)
        whole.append((time.perf_counter() - began, timer.seconds))
        return timer
    monkeypatch.setattr(train, "loop", timed)
    train.train({**tiny, "task": "sr", "steps": 20, "eval_every": 20, "profile": True,
                 "out": str(tmp_path / "r")})
    row = re.compile(r"^(\w[\w ]*?)\s+([\d.]+)\s+([\d.]+) %$", re.MULTILINE)
    table = row.findall(capsys.readouterr().out)
    assert {name for name, *_ in table} == {"data", "forward", "backward", "optimizer", "EMA", "probe",
                                            "guidance", "structure", "log and evaluation"}
    (all_of_it, seconds), = whole
    assert sum(float(shown) for _, shown, _ in table) == pytest.approx(sum(seconds.values()), abs=0.5)
    assert 0.8 * all_of_it < sum(seconds.values()) < all_of_it
    assert min(seconds["forward"], seconds["backward"]) > seconds["EMA"] > 0


# --- command line

def test_terminated_runs_save_and_say_how_to_continue(tiny, tmp_path, bare):
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
    until(lambda: process.poll() is not None or (log.exists() and log.read_text().count("\n") >= 1))
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    step = final(tmp_path / "r")["step"]
    assert process.returncode == 130 and 10 <= step < 400
    assert f"continue with: python train.py --resume {tmp_path / 'r'}" in err
    train.train({"steps": step + 3}, str(tmp_path / "r"))
    straight = train.train({**settings, "steps": step + 3, "out": str(tmp_path / "straight")})
    assert same_weights(final(tmp_path / "r"), final(straight))


def test_each_phase_is_said_once_and_only_where_something_follows_r(tiny, tmp_path, bare, capsys):
    """A replayed r that jumps at step 20, goes back at 26 and up again: nothing is said a second time,
    and nothing by a recipe that follows nothing."""
    r = {k: 0.0 if k < 20 or 26 <= k < 28 else 0.95 for k in range(1, 33)}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"step": k, "r": r[k]}) + "\n" for k in r))
    settings = {**tiny, "steps": 32, "eval_every": 32}
    train.train({**settings, "regime": f"replay:{tmp_path / 'r.jsonl'}", "out": str(tmp_path / "a")})
    said = re.findall(r"step (\d+): (.+) \(r = ([\d.]+)\)", capsys.readouterr().out)
    assert said == [("1", "acquires semantics", "0.00"), ("20", "refines detail", "0.95"),
                    ("20", "guidance ends", "0.95")]
    train.train({**settings, "recipe": "static", "out": str(tmp_path / "b")})
    assert not re.search(r"\(r = ", capsys.readouterr().out)


@pytest.mark.parametrize("script", ["data.py", "model.py", "sampler.py", "regime.py", "guidance.py",
                                    "structure_reg.py"])
def test_the_demo_of_each_concept_file_passes_its_own_assertions(script, capsys):
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 5


@pytest.mark.slow
def test_a_compiled_checkpointed_accumulated_run_passes_its_first_full_probe_with_guidance_on(
        tiny, tmp_path, bare):
    """At step 32 the losses' gradients are compared, which a compiled backward pass does not allow: it
    must not be asked."""
    run = train.train({**tiny, "steps": 40, "eval_every": 40, "compile": True, "checkpointing": True,
                       "accumulate": 2, "structure": "constant", "out": str(tmp_path / "r")})
    rows = step_rows(run)
    assert [row["step"] for row in rows if "agreement" in row] == [32]
    assert [row["step"] for row in rows if "struct_share" in row] == [32, 38]
    assert all(np.isfinite(row["loss"]) for row in rows)
