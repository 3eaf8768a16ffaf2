"""Claims about what is counted without measuring."""
import itertools
import json

import pytest
import torch
from conftest import ROOT, in_process

from lab import estimate
from parts import config
from parts.attention import attention

GROWING = ("parameters", "flop_a_step", "launches_a_step", "bytes_a_step", "memory_gb", "saved_mb_a_clip")


@pytest.fixture(scope="module")
def rows():
    """Of the three presets in small, each larger than the one before it; {task: rows}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.PRESETS, "smoke", ({"width": 32, "depth": 1, "heads": 2}, {}))
        patch.setitem(config.PRESETS, "small", ({"width": 64, "depth": 2, "heads": 4, "batch": 64}, {}))
        patch.setitem(config.PRESETS, "full", ({"width": 96, "depth": 3, "heads": 4, "batch": 128}, {}))
        patch.setitem(config.RECIPES, "stage", config.RECIPES["static"])  # one block has no groups
        return {task: estimate.estimate(task) for task in estimate.TASKS}


def test_what_a_function_asks_for_is_counted_by_hand():
    """Two matrix products and a relu under autograd, in float32; views and random access ask for nothing.
    Products are counted and not computed."""
    a, b = torch.ones(8, 4), torch.ones(4, 16, requires_grad=True)

    def forward():
        return torch.relu((a @ b).view(2, 4, 16).transpose(0, 1)[1:])

    done = estimate.work(forward)
    assert (done.flop, done.launches) == (2 * 8 * 4 * 16, 2)
    product, relu = 8 * 4 + 4 * 16 + 8 * 16, 2 * 3 * 2 * 16
    assert done.bytes == 4 * (product + relu)
    assert float((a @ b).detach().sum()) == 512, "outside of the count it is computed"

    # Backward: of the sum one expanded element is read; then threshold, slice, product.
    both = estimate.work(lambda: forward().sum().backward())
    assert both.flop == 2 * done.flop and both.launches > done.launches + 2
    joined = torch.stack([a, a])
    assert estimate.work(lambda: torch._foreach_add([a, a], 1.0)).bytes == 2 * 4 * joined.numel()
    assert estimate.work(lambda: (a.T, a[2], a.expand(3, 8, 4), a.detach())) == estimate.Work(0, 0, 0)


def test_attention_is_counted_by_hand_on_a_cpu_too():
    """Two products of (T, d) and (d, S) a head; in the backward pass five, of which one is done again."""
    B, H, T, S, d = 2, 3, 16, 20, 8
    q, k, v = (torch.randn(B, H, n, d, requires_grad=True) for n in (T, S, S))
    product = 2 * B * H * T * S * d

    def attend():
        return attention(q, k, v, torch.ones(B, 1, 1, S, dtype=torch.bool))

    assert estimate.flop(attend) == estimate.work(attend).flop == 2 * product
    assert estimate.flop(lambda: attend().sum().backward()) == (2 + 5) * product


def test_work_grows_with_the_clips_and_the_update_and_the_launches_do_not():
    """Twice the batch: what is told from two clips is what four would be counted as."""
    tiny = {"task": "t2a", "device": "cpu", "recipe": "static", "precision": "fp32", "width": 32, "depth": 2,
            "heads": 2, "out": "unused"}
    told, counted = (estimate.count_step(config.resolve({**tiny, "batch": 8}), clips) for clips in (2, 8))
    assert told.flop == counted.flop and told.launches == counted.launches
    assert abs(told.bytes / counted.bytes - 1) < 0.01
    larger = estimate.count_step(config.resolve({**tiny, "batch": 16}), 2)
    assert larger.flop > 1.5 * told.flop and larger.launches == told.launches


def test_a_step_takes_the_longer_of_starting_kernels_and_of_running_them():
    peak, bandwidth = estimate.CARDS["H100"]
    launches = estimate.Work(0, 2_000, 0)
    assert estimate.step_seconds(launches, "H100") == pytest.approx(2_000 * estimate.LAUNCH_S)
    card = estimate.Work(peak, 2_000, bandwidth)
    assert estimate.step_seconds(card, "H100") == pytest.approx(1 / estimate.REACHED + 1)


def test_the_recorded_estimate_is_of_these_presets_and_small_fits_a_card_of_8_gb_and_five_minutes():
    """A quarter of the card is left to what is not counted: the driver, buffers, the validation clips."""
    rows = json.loads((ROOT / "results/estimate.json").read_text())
    for row in rows:
        cfg = config.resolve({"device": "cpu", "task": row["task"], "preset": row["preset"], "out": "unused"})
        assert (row["steps"], row["batch"]) == (cfg.steps, cfg.batch), "run lab.estimate again"
    small = [row for row in rows if row["preset"] == "small"]
    assert len(small) == 2
    for row in small:
        assert row["memory_gb"] < 6 and row["minutes"]["H100"] < 5


def test_the_estimate_grows_with_the_preset_and_checkpointing_cuts_memory(rows):
    for of_task in rows.values():
        assert [row["preset"] for row in of_task] == ["smoke", "small", "full"]
        for smaller, larger in itertools.pairwise(of_task):
            assert all(smaller[key] < larger[key] for key in GROWING)
        for row in of_task:
            assert row["saved_mb_a_clip_checkpointing"] < 0.7 * row["saved_mb_a_clip"]
            assert row["memory_gb_checkpointing_accumulate_4"] < row["memory_gb"]
    assert "with --checkpointing --accumulate 4" in estimate.estimate_table(rows["t2a"])


def test_the_command_prints_every_preset_of_both_tasks_and_writes_them(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "estimate", rows.get)
    done = in_process(estimate, "--out", tmp_path / "e.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "e.json").read_text())
    assert written == rows["t2a"] + rows["sr"]
    assert done.stdout == estimate.estimate_table(written) + "\n"
