"""Claims about what a run says while it goes on."""
import pytest
import torch

from parts.config import Config
from parts.errors import UserError
from parts.progress import MAX_SKIPPED, REFINES, Phases, introduction, skipped_line

ACQUIRES, REFINED, ENDS = "acquires semantics", "refines detail", "guidance ends"
CONVERGED = "the blocks have converged to groups: the structure loss sets in"


def said(course, **settings) -> list[str]:
    """What a run says in the course [(r, lambda, share), ...] of its steps."""
    phases = Phases(Config(device="cpu", **settings))
    return [line for k, now in enumerate(course, 1) for line in phases.new(k, *now)]


def test_a_run_says_what_it_trains_on_what_and_where():
    cfg = Config(device="cpu", precision="fp32", out="runs/x")
    said, note = introduction(cfg, 6_000, torch.nn.Linear(999, 1_000), 6).split("\n")
    assert note.startswith("note: groups among 4 blocks can't be told from depth")
    assert "\n" not in introduction(cfg, 6_000, torch.nn.Linear(999, 1_000), 4), "four would do"
    assert said == ("t2a on soundworld: 6000 clips, 1.00 M parameters, recipe stage, 6000 steps of 32 on cpu "
                    "in fp32, run folder runs/x")


def test_a_phase_is_said_with_its_step_and_r():
    course = [(0.0, 0.5, 0.0), (0.7, 0.15, 0.0), (0.8, 0.1, 0.05), (0.95, 0.0, 0.1)]
    assert said(course) == [
        f"step 1: {ACQUIRES} (r = 0.00)",
        f"step 2: {REFINED} (r = 0.70)",
        f"step 3: {CONVERGED} (r = 0.80)",
        f"step 4: {ENDS} (r = 0.95)",
    ]
    assert said([(REFINES, 0.0, 0.1)]) == [f"step 1: {x} (r = 0.60)" for x in (REFINED, ENDS, CONVERGED)]


def test_each_phase_is_said_at_most_once_however_r_moves():
    """r crosses each threshold many times. Negative control: a line a crossing would be hundreds."""
    there, back = (0.95, 0.0, 0.1), (0.1, 0.45, 0.0)
    lines = said([back, there] * 100)
    assert len(lines) == 4
    for phase in (ACQUIRES, REFINED, ENDS, CONVERGED):
        assert sum(phase in line for line in lines) == 1
    alone = [line for k, now in enumerate([back, there] * 100) for line in Phases(Config()).new(k, *now)]
    assert len(alone) == 400, "a memory a step is none"


def test_what_is_not_reached_is_not_said():
    assert said([(0.0, 0.5, 0.0)] * 20) == [f"step 1: {ACQUIRES} (r = 0.00)"]


def test_only_an_adaptive_mechanism_has_phases():
    """Neutral: a run that follows no r says nothing; one with one mechanism nothing of the others."""
    course = [(0.0, 0.5, 0.0), (0.95, 0.0, 0.1)]
    fixed = dict(guidance="constant", timesteps="constant", structure="constant")
    assert said(course, **fixed) == []
    assert said(course, **(fixed | {"timesteps": "adaptive"})) == [
        f"step 1: {ACQUIRES} (r = 0.00)", f"step 2: {REFINED} (r = 0.95)"]
    guided = said(course, **(fixed | {"guidance": "adaptive"}))
    structured = said(course, **(fixed | {"structure": "adaptive"}))
    assert guided[2:] == [f"step 2: {ENDS} (r = 0.95)"]
    assert structured[2:] == [f"step 2: {CONVERGED} (r = 0.95)"]


def test_a_skipped_step_names_three_clips_and_too_many_end_the_run(tmp_path):
    few = skipped_line(tmp_path, 7, ["one", "two"], 1)
    assert few == "step 7 is skipped: its loss or gradient is not finite; clips one, two"
    many = skipped_line(tmp_path, 7, ["one", "two", "three", "four"], MAX_SKIPPED - 1)
    assert many.endswith("clips one, two, three ...")
    with pytest.raises(UserError, match=f"no finite gradient in {MAX_SKIPPED} steps") as error:
        skipped_line(tmp_path, 7, ["one"], MAX_SKIPPED)
    assert str(tmp_path / "checkpoint.pt") in str(error.value)


def test_a_resumed_run_does_not_say_again_what_holds_already():
    phases = Phases(Config(), resumed=True)
    assert phases.new(500, 0.7, 0.2, 0.0) == []
    assert phases.new(501, 0.95, 0.0, 0.0) == ["step 501: guidance ends (r = 0.95)"]
