"""Claims about what is counted without measuring."""
import itertools
import json

from conftest import in_process

from lab import estimate
from parts import config

GROWING = ("parameters", "flop_a_step", "memory_gb", "saved_mb_a_clip")


def small_presets(monkeypatch):
    """The three presets in small, each larger than the one before it."""
    monkeypatch.setitem(config.PRESETS, "smoke", ({"width": 32, "depth": 2, "heads": 2}, {}))
    monkeypatch.setitem(config.PRESETS, "small", ({"width": 64, "depth": 4, "heads": 4, "batch": 64}, {}))
    monkeypatch.setitem(config.PRESETS, "full", ({"width": 96, "depth": 6, "heads": 4, "batch": 128}, {}))


def test_the_estimate_of_memory_grows_with_the_preset_and_checkpointing_cuts_it(monkeypatch):
    small_presets(monkeypatch)
    for task in ("t2a", "sr"):
        rows = estimate.estimate(task)
        assert [row["preset"] for row in rows] == ["smoke", "small", "full"]
        for smaller, larger in itertools.pairwise(rows):
            assert all(smaller[key] < larger[key] for key in GROWING)
        for row in rows:
            assert row["saved_mb_a_clip_checkpointing"] < 0.6 * row["saved_mb_a_clip"]
            assert row["memory_gb_checkpointing_accumulate_4"] < row["memory_gb"]
    assert "with --checkpointing --accumulate 4" in estimate.estimate_table(rows)


def test_the_command_prints_every_preset_of_both_tasks_and_writes_them(tmp_path, monkeypatch):
    small_presets(monkeypatch)
    done = in_process(estimate, "--out", tmp_path / "e.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [row["task"] for row in rows] == ["t2a"] * 3 + ["sr"] * 3
    assert done.stdout == estimate.estimate_table(rows) + "\n"
