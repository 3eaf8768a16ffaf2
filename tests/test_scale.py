"""Claims about scale: several devices, gradient accumulation, checkpointing, and the benchmark that measures all of it."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process

import bench
import config
import data
import evaluate
import experiments
import learner
import model as M
import train


def weights(run, which="model"):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)[which]


def apart(a, b):
    """Relative distance of two sets of weights. (Of all of them: AdamW divides by the gradient's size, so a weight whose gradient is
    rounding noise moves by its learning rate in either direction.)"""
    return float(sum((a[k] - b[k]).square().sum() for k in a) ** 0.5 / sum(b[k].square().sum() for k in b) ** 0.5)


def flags(settings):
    return [x for k, v in settings.items() for x in ((f"--{k.replace('_', '-')}",) + ((str(v),) if not isinstance(v, bool) else ()))]


def torchrun(out, settings, *more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env = {k: v for k, v in env.items() if not k.startswith("PYTEST")}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", ROOT / "train.py", *flags(settings),
                             "--out", out, *more], env=env, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def bare(monkeypatch):
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    monkeypatch.setattr(evaluate, "dashboard", lambda *a: None)
    monkeypatch.setattr(evaluate, "score", lambda *a, **k: None)


def test_two_processes_with_half_the_batch_each_are_one_process_with_all_of_it(tiny, tmp_path, bare):
    """gloo, mechanisms off: the same parameters to float32 tolerance, one log, one voice. Negative control: half the batch alone."""
    settings = {**tiny, "task": "t2a", "recipe": "vanilla", "probe": "never", "steps": 8, "eval_every": 8, "score_clips": 2}
    job = torchrun(tmp_path / "two", settings)
    one = train.train({**settings, "out": str(tmp_path / "one")})
    text = job.communicate(timeout=200)[0]
    assert job.returncode == 0, text[-2000:]
    assert apart(weights(tmp_path / "two"), weights(one)) < 1e-3 and text.count("trained 8 steps") == 1 and "on 2 x cpu" in text
    two, alone = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("two", "one"))
    assert [r["step"] for r in two] == [r["step"] for r in alone]
    half = train.train({**settings, "batch": tiny["batch"] // 2, "out": str(tmp_path / "half")})
    assert apart(weights(half), weights(one)) > 1e-2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_process_that_dies_ends_the_job_with_one_line_and_a_run_that_goes_on(tiny, tmp_path, bare):
    settings = {**tiny, "task": "t2a", "recipe": "stage", "steps": 4_000, "eval_every": 20, "score_clips": 2, "width": 64}
    job = torchrun(tmp_path / "run", settings)
    until(lambda: (tmp_path / "run" / "checkpoint.pt").is_file(), 100)
    victims = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/environ") if is_rank_1(p, tmp_path)]
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    text = job.communicate(timeout=100)[0]
    assert job.returncode != 0 and "lost the others" in text and "--resume" in text, text
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 20 and step % 20 == 0
    cfg, ckpt = config.settings({}, str(tmp_path / "run"))
    assert ckpt["step"] == step and cfg.steps == 4_000


def is_rank_1(environ, folder):
    try:
        return b"\0RANK=1\0" in b"\0" + environ.read_bytes() and str(folder).encode() in (environ.parent / "cmdline").read_bytes()
    except OSError:
        return False


def until(condition, seconds):
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def test_a_batch_in_parts_gives_the_gradient_of_the_whole_and_cannot_be_cut_unevenly(tiny, tmp_path, bare):
    settings = {**tiny, "task": "sr", "recipe": "vanilla", "probe": "never", "steps": 6, "eval_every": 6}
    whole, cut = (train.train({**settings, "accumulate": n, "out": str(tmp_path / str(n))}) for n in (1, 4))
    assert apart(weights(cut), weights(whole)) < 1e-3
    with pytest.raises(data.UserError, match="--accumulate 3: must be a divisor of --batch 8"):
        config.resolve({**settings, "accumulate": 3})


def test_checkpointing_keeps_less_and_changes_no_gradient():
    torch.manual_seed(0)
    net = M.DiT(8, 32, 4, 2, vocab=20)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, ids = torch.randn(4, 32, 8), torch.rand(4), torch.randint(1, 20, (4, 6))
    grads, kept = {}, {}
    for on in (False, True):
        net.checkpointing = on
        loss = lambda: net(x, t, net.encode_text(ids)).square().mean()
        kept[on] = bench.saved_bytes(loss)
        net.zero_grad()
        loss().backward()
        grads[on] = [p.grad.clone() for p in net.parameters()]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[False], grads[True])) and kept[True] < 0.6 * kept[False]


def test_what_is_drawn_ahead_is_what_would_have_been_drawn(monkeypatch):
    """The thread that a GPU run uses gives each step the same clips, also where guidance is switched on in between."""
    monkeypatch.setattr(data, "draw_batch", lambda latents, muffled, batch, T, rng, phi, rows: {"x": rng.integers(0, 1 << 30, batch)[rows], "phi": phi is not None})
    cfg = config.Config(batch=8, device="cpu")
    plain = learner.Ahead(cfg, None, None, 4, "phi", slice(2, 5))
    ahead = learner.Ahead(config.Config(batch=8, device="cuda"), None, None, 4, "phi", slice(2, 5))
    assert plain.pool is None and ahead.pool is not None
    for step, phi in ((1, False), (2, False), (3, True), (4, True), (9, True)):
        a, b = plain(step, phi), ahead(step, phi)
        assert np.array_equal(a["x"], b["x"]) and a["phi"] == b["phi"] == phi and len(a["x"]) == 3


def test_rows_of_a_batch_are_those_of_the_whole_batch(waves):
    world = data.SoundWorld("val", 64)
    z = data.LatentCache(world, M.Codec(8).fit(waves[:10]))
    whole = data.draw_batch(z, z, 12, 20, np.random.default_rng(3), z)
    part = data.draw_batch(z, z, 12, 20, np.random.default_rng(3), z, slice(4, 9))
    assert all(np.array_equal(part[k], whole[k][4:9]) for k in whole)
    cfg, ids = config.Config(device="cpu"), [[torch.tensor([2, 3])]] * 64
    del whole["cond"], part["cond"]
    a, b = (learner.batch_to(x, ids, cfg, torch.Generator().manual_seed(1), 0.5, 12, rows) for x, rows in ((whole, slice(None)), (part, slice(4, 9))))
    assert all(torch.equal(b[k], a[k][4:9]) for k in a)


# --- the benchmark

def test_the_estimate_of_memory_grows_with_the_preset_and_checkpointing_cuts_it(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "small", ({"width": 64, "depth": 4, "heads": 4, "batch": 64}, {}))
    monkeypatch.setitem(config.PRESETS, "full", ({"width": 96, "depth": 6, "heads": 4, "batch": 128}, {}))
    monkeypatch.setitem(config.PRESETS, "smoke", ({"width": 32, "depth": 2, "heads": 2}, {}))
    for task in ("t2a", "sr"):
        rows = bench.estimate(task)
        assert [r["preset"] for r in rows] == ["smoke", "small", "full"]
        assert all(a[k] < b[k] for a, b in itertools.pairwise(rows) for k in ("parameters", "flop_a_step", "memory_gb", "saved_mb_a_clip"))
        assert all(r["saved_mb_a_clip_checkpointing"] < 0.6 * r["saved_mb_a_clip"] and r["memory_gb_checkpointing_accumulate_4"] < r["memory_gb"] for r in rows)
    assert "with --checkpointing --accumulate 4" in bench.estimate_table(rows)



def test_arms_take_turns_and_a_slower_one_is_told_by_its_ratio():
    order = []
    seconds = bench.in_turns({"a": lambda: (order.append("a"), time.sleep(0.002)), "b": lambda: (order.append("b"), time.sleep(0.006))}, rounds=12, warm_up=2)
    assert len(order) == 28 and all(set(order[k : k + 2]) == {"a", "b"} for k in range(0, 28, 2)) and len(seconds["a"]) == 12
    r, back = bench.ratio(seconds["b"], seconds["a"]), bench.ratio(seconds["a"], seconds["b"])
    assert r["interval"][0] > 1.5 and abs(r["ratio"] * back["ratio"] - 1) < 1e-9


def test_counted_flop_are_the_closed_form_of_a_plain_dit():
    """Forward: 2 B T (embed + L (12 D^2 + 2 T D) + head) + adaLN and time per clip; attention 2 x 2 B T^2 D a block."""
    B, T, C, D, L = 3, 16, 8, 32, 2
    net = bench.PlainDiT(C, D, L, 2, 10, False, T)
    counted = bench.flop(lambda: net(torch.randn(B, T, C), torch.rand(B), torch.ones(B, 4, dtype=torch.long)))
    tokens = 2 * B * T * (2 * C * D + L * 12 * D * D)
    clips = 2 * B * (256 * D + D * D + L * 6 * D * D + 2 * D * D)
    attention = L * 2 * 2 * B * T * T * D
    assert tokens + clips <= counted <= tokens + clips + attention + 1 and counted - tokens - clips in (0, attention)


def test_the_plain_peer_learns_what_ours_learns():
    """A fair peer: on Gaussian data both come near the exact velocity. (Not a race: 150 steps of each one's own optimizer.)"""
    cfg = config.resolve({"width": 32, "depth": 2, "heads": 2, "channels": 4, "batch": 64, "task": "sr", "recipe": "vanilla", "out": "unused", "precision": "fp32", "device": "cpu"})
    torch.manual_seed(0)
    plain, ours = bench.Plain(cfg, 0, 8, False), bench.Ours(cfg, None, 8, 0.0, 0.0)
    plain.opt.param_groups[0]["lr"] = 2e-3
    final = {"plain": [], "ours": []}
    for k in range(150):
        x0 = 0.5 * torch.randn(64, 8, 4)
        b = {"x0": x0, "eps": torch.randn(64, 8, 4), "t": torch.rand(64), "cond": x0.roll(1, 1), "drop": torch.zeros(64, dtype=torch.bool)}
        for name, arm in (("plain", plain), ("ours", ours)):
            final[name].append(arm.loss(b).item())
            arm.step(b)
    assert np.mean(final["plain"][-20:]) < 0.8 * np.mean(final["plain"][:5]) and np.mean(final["ours"][-20:]) < 0.9 * np.mean(final["ours"][:5])


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path, monkeypatch):
    """At a tiny shape: every row there, with its interval; a table; JSON."""
    monkeypatch.setitem(config.PRESETS, "smoke", ({"width": 32, "depth": 2, "heads": 2, "batch": 8, "channels": 16, "sample_steps": 2}, {"variants": 1}))
    monkeypatch.setattr(bench, "matmul_rate", lambda *a: 1e9)
    for name, small in (("bench_generation", (2,)), ("bench_data", (1, 2))):
        right = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda *a, right=right, small=small: right(*a, sizes=small))
    right = bench.bench
    monkeypatch.setattr(bench, "bench", lambda *a: right(*a, clips=100))
    done = in_process(experiments, "bench", "--preset", "smoke", "--device", "cpu", "--rounds", 3, "--out", tmp_path / "b.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "b.json").read_text())
    assert {(s["task"], s["precision"], s["arm"]) for s in r["steps"]} == {(t, p, a) for t in ("t2a", "sr") for p in ("fp32", "bf16") for a in ("plain", "vanilla", "stage", "AdamW")}
    assert all(s["against_plain"]["ratio"] == 1 for s in r["steps"] if s["arm"] == "plain") and all(s["saved_mb"] > 0 and s["flop_per_s"] > 0 for s in r["steps"])
    assert {x["task"] for x in r["run"]} == {"t2a", "sr"} and all(abs(sum(x["parts_of_a_stage_step"].values()) - 1) < 1e-9 and x["stage_over_vanilla"]["ratio"] > x["step"]["ratio"] > 0 for x in r["run"])
    assert "stage over vanilla" in done.stdout and "x real time" in done.stdout and "saved MB" in done.stdout
