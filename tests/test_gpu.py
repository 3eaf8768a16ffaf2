"""Claims about devices, on a pretended one (pretended_gpu.py)."""
import dataclasses
import functools
import json
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from pretended_gpu import GPU, pretend
from run_files import step_rows
from tiny_models import tiny_model, write_recordings

import data
import evaluate
import structure_reg
import train
from lab import bench
from parts import config, devices, runs

SMALL = {**TINY, "device": "cuda", "depth": 3, "steps": 6, "eval_every": 6}


def test_the_pretence_refuses_what_a_gpu_refuses():
    with pretend():
        a, b = torch.randn(3, device="cuda"), torch.randn(3)
        assert a.is_cuda and a.device == GPU and not b.is_cuda and not a.cpu().is_cuda
        assert (2 * a + torch.tensor(2.0)).is_cuda and a[b.long() * 0].is_cuda
        for wrong in (lambda: a + b, lambda: torch.cat([a, b]), lambda: torch.where(a > 0, a, b),
                      lambda: b[a.long() * 0]):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="to numpy"):
            a.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        linear = torch.nn.Linear(3, 2).to("cuda")
        linear(a).sum().backward()
        assert isinstance(linear.weight, torch.nn.Parameter) and linear.weight.grad.is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            linear(b)
    assert not torch.randn(3).to("cpu").is_cuda, "afterwards all is as before"


def test_the_pretence_counts_waits_and_names_their_lines():
    with pretend() as gpu:
        a, b = torch.randn(3, device="cuda"), torch.randn(3)
        gpu.waits.clear()
        a.sum().detach(), torch.zeros(3, device="cuda"), b.pin_memory().to("cuda", non_blocking=True)
        assert not gpu.waits
        float(a.sum()), a.cpu(), b.to("cuda"), b.to("cuda", non_blocking=True), a[a > 0]
        assert gpu.waits.total() == 5 and all(where.startswith("test_gpu.py:") for where in gpu.waits)


def test_a_pretended_apple_gpu_has_no_float64():
    with pretend("mps"):
        a = torch.randn(3, device="mps")
        for wrong in (lambda: a.double(), lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
                      lambda: torch.zeros(2, dtype=torch.float64).to("mps")):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        assert torch.zeros(2, dtype=torch.float64).to(a).dtype == torch.float32


@pytest.fixture
def quiet(monkeypatch):
    """Without the pictures, which take longer than all the rest."""
    monkeypatch.setattr(train, "draw_pages", lambda *a: None)
    monkeypatch.setattr("parts.previews.draw_previews", lambda *a: None)


@pytest.mark.parametrize("task", [pytest.param("t2a", marks=pytest.mark.slow), "sr"])
def test_a_run_its_continuation_and_its_use(task, tmp_path, quiet):
    settings = {"structure": "constant", "guidance": "constant", "probe": "always", "steps": 33,
                "eval_every": 33, "score_clips": 4}
    with pretend():
        out = train.train({**SMALL, **settings, "task": task, "out": str(tmp_path / "run")})
        train.train({"steps": 34}, str(out))
        run = evaluate.load_run(out, "cuda")
        assert next(run.model.parameters()).is_cuda
        if task == "t2a":
            evaluate.generate(run, ["a bell", ""], [0, 1], tokens=100)
        else:
            sound = 0.1 * np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
            evaluate.upsample_long(run, sound, 2_000.0)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert np.isfinite([row["loss"] for row in rows if "loss" in row]).all()


# --- switches

SWITCHES = [
    {"accumulate": 2, "checkpointing": True, "structure": "constant", "probe": "always"},
    {"regime": "loss", "teacher": "shuffled", "struct_loss": "dispersive", "structure": "constant",
     "optimizer": "adamw"},
    {"timesteps": "infonoise", "struct_loss": "diversity", "structure": "constant", "data": "mixed"},
    {"regime_signal": "latent", "recipe": "stage"},
]


FAST, *SLOW = SWITCHES


@pytest.mark.parametrize("more", [FAST, *(pytest.param(more, marks=pytest.mark.slow) for more in SLOW)],
                         ids=lambda more: next(iter(more)))
def test_no_switch_mixes_tensors_of_two_devices(more, tmp_path, bare, waves):
    """Which the pretended GPU would refuse; and all losses are numbers."""
    settings = {**SMALL, "task": "t2a", "steps": 33, "eval_every": 33, "batch": 4}
    if more.get("data"):                                           # clips of unequal lengths, so with a mask
        (tmp_path / "mine").mkdir()
        more = {**more, "data": f"{write_recordings(tmp_path / 'mine', waves)}=1,soundworld=1"}
    with pretend():
        out = train.train({**settings, **more, "out": str(tmp_path / "run")})
    rows = step_rows(out)
    assert rows[-1]["step"] == 33 and np.isfinite([row["loss"] for row in rows]).all()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{"codec": "dac"}, {"teacher": "hubert"},
                                   {"codec": "dac", "teacher": "hubert", "text": "t5"}], ids=str)
def test_pretrained_parts_and_the_embedded_ones_meet_on_the_gpu(parts, tmp_path, bare):
    """One at a time, so that each meets the embedded others. (freeze() makes them bfloat16 on a GPU.)"""
    parts = {name: str(tiny_model(kind, tmp_path / kind)) for name, kind in parts.items()}
    with pretend():
        out = train.train({**SMALL, "task": "t2a", "out": str(tmp_path / "run"), "channels": 8, "steps": 33,
                           "guidance": "constant", "probe": "always", **parts})
        run = evaluate.load_run(out, "cuda")
        assert np.isfinite(evaluate.generate(run, ["a dog"], [0])).all()


def test_groups_are_detected_as_on_a_cpu():
    """The blocks' signatures and their null on the device: the same p."""
    blocks = structure_reg.demo_blocks(8, 3, shared=0.6, seed=8)
    expected = structure_reg.GroupDetector(8).check(1, blocks, 1.0)
    with pretend():
        there = [tuple(w.to("cuda") for w in block) for block in blocks]
        found = structure_reg.GroupDetector(8).check(1, there, 1.0)
    assert found.pop("contrast") == pytest.approx(expected.pop("contrast"), abs=1e-5)
    assert np.allclose(found.pop("S"), expected.pop("S"), atol=1e-3)
    assert found == expected and expected["p"] < 0.05


def test_on_cuda_the_network_is_compiled_and_bfloat16_used_where_the_card_multiplies_it(tmp_path):
    for capability, precision in (((9, 0), "bf16"), ((7, 5), "fp32")):
        with pretend(capability=capability):
            cfg = config.resolve({"device": "cuda", "out": "unused"})
            assert (cfg.compile, cfg.precision) == (True, precision)
            assert not config.resolve({"device": "cuda", "compile": False, "out": "unused"}).compile
            assert not config.resolve({"device": "cpu", "out": "unused"}).compile
            (tmp_path / precision).mkdir()
            config.save_config(tmp_path / precision, cfg)
            assert runs.open_settings({}, str(tmp_path / precision))[0].compile
            there, _ = runs.open_settings({"device": "cpu"}, str(tmp_path / precision))
            assert not there.compile, "gone on with elsewhere, it is as it would be there"


# --- what a step waits for

def batch_of_step(run, k: int) -> tuple:
    """-> what drives step k, with all losses on, and its batch, as train.loop has them."""
    driven = train.drive(run.cfg, 0.5, k, run.detector)
    drawn, generator = run.draw(k, True)
    return driven, data.add_noise(drawn, run.data.token_ids, run.cfg, generator, driven.density,
                                  run.cfg.batch, run.draw.rows)


def take_step(run, k: int) -> dict:
    """Step k of train.loop, without probe and log. -> its batch."""
    run.step = k
    driven, batch = batch_of_step(run, k)
    train.gradients(run, None, driven, batch, devices.ignore)
    train.update(run.cfg, run.networks, k)
    return batch


@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_a_plain_step_waits_once_for_the_device_and_sees_what_a_cpu_would_see(task, tmp_path, capsys):
    """Guidance and structure on; data on the GPU, or read from disk where the GPU has no room for it."""
    cfg = config.resolve({**SMALL, "task": task, "out": str(tmp_path), "recipe": "static",
                          "structure": "constant", "device": "cpu", "compile": True})
    cfg.device = "cuda"
    with pretend() as gpu:
        run, batches = train.prepare(cfg, None, "", lambda folder: None), {}
        run.detector.take_ratio(1.0)
        for name, free in (("resident", 10**10), ("from disk", 1)):
            with pretend(free=free):
                run.draw = data.Prefetcher(cfg, run.data, data.choose_crops, data.read_crops)
            take_step(run, 1)                                      # copies tables once
            gpu.waits.clear()
            batches[name] = [take_step(run, k) for k in range(2, 6)]
            line = line_of("float(torch.nn.utils.clip_grad_norm_")
            assert gpu.waits == {f"train.py:{line} __float__": 4}
            assert all(x.is_cuda for batch in batches[name] for x in batch.values())
            assert (run.draw.resident is not None) == (name == "resident")
    assert "read from disk" in capsys.readouterr().out

    # On a CPU: the same numbers, with captions as long as the longest of the batch.
    run.cfg = dataclasses.replace(cfg, device="cpu")
    run.draw = data.Prefetcher(run.cfg, run.data, data.choose_crops, data.read_crops)
    for k in range(2, 6):
        _, here = batch_of_step(run, k)
        for there in (batches["resident"][k - 2], batches["from disk"][k - 2]):
            assert there.keys() == here.keys()
            for name, x in here.items():
                y = there[name][:, : x.shape[1]] if name == "ids" else there[name]
                assert torch.equal(x, y), name
            assert task == "sr" or there["ids"].shape[1] in (16, 32, 40)


def line_of(text: str) -> int:
    lines = (ROOT / "train.py").read_text().splitlines()
    found = [k for k, line in enumerate(lines, 1) if text in line]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_no_float64_reaches_an_apple_gpu(task, tmp_path, quiet):
    settings = {"structure": "constant", "probe": "always", "steps": 33, "eval_every": 33, "device": "mps"}
    with pretend("mps"):
        out = train.train({**SMALL, **settings, "task": task, "out": str(tmp_path / "run")})
        run = evaluate.load_run(out, "mps")
    assert next(run.model.parameters()).device.type == "mps" and np.isfinite(step_rows(out)[-1]["loss"])


# --- the laboratory

@pytest.mark.slow
def test_the_benchmark_runs_all_its_arms_on_the_gpu(monkeypatch):
    tiny = {"width": 32, "depth": 2, "heads": 2, "batch": 8, "channels": 16, "sample_steps": 2}
    monkeypatch.setitem(config.PRESETS, "smoke", (tiny, {"variants": 1}))
    monkeypatch.setattr(bench, "matmul_rate", lambda *a: 1e9)
    monkeypatch.setattr(bench, "bench_generation", functools.partial(bench.bench_generation, sizes=(2,)))
    monkeypatch.setattr(bench, "bench_data", functools.partial(bench.bench_data, sizes=(1,)))
    with pretend():
        result = bench.bench("cuda", "smoke", 3, clips=100)
    assert {row["arm"] for row in result["steps"]} >= {"plain", "vanilla", "static", "stage"}


def test_hours_are_measured_until_the_gpu_is_done(monkeypatch):
    """A time taken without torch.cuda.synchronize would be that of starting kernels."""
    waited = []
    with pretend():
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        bench.estimate_hours([{**SMALL, "seconds": 0.64}])
    assert len(waited) >= 4 and set(waited) == {"cuda"}


def test_peak_memory_of_a_step_begins_anew_with_it(monkeypatch):
    """Most that a step takes beyond what is held before it."""
    order = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: order.append("held") or 2e6)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: order.append("peak") or 5e6)
    arm = types.SimpleNamespace(step=lambda batch: order.append("step"))
    assert bench._step_mb(arm, {}, "cuda:1") == 3 and order == ["reset", "held", "step", "peak"]


def test_the_gpu_of_a_machine_is_not_named_where_a_run_was_on_its_cpu():
    with pretend():
        assert devices.hardware("cuda") == "a pretended GPU" != devices.hardware("cpu")


def test_out_of_memory_on_a_gpu_is_one_line_that_says_what_to_change(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page more")
    with pytest.raises(SystemExit) as end:
        devices.run_on_all(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and "--batch" in err and "--accumulate" in err
