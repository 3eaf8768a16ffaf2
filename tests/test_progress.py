"""Claims about what a run says while it goes on."""
import pytest

from parts.errors import UserError
from parts.progress import MAX_SKIPPED, phase_line, skipped_line


def test_a_phase_in_words():
    assert phase_line(0.1, 0.5, 2.0, 0.0) == (
        "r = 0.10 (acquires), guidance at 0.50, sampler centre t = 0.88, structure off")
    assert phase_line(0.5, 0.0, 1.5, 0.1) == (
        "r = 0.50 (refines), guidance off, sampler centre t = 0.82, structure at 0.100")


def test_a_skipped_step_names_three_clips_and_too_many_end_the_run(tmp_path):
    few = skipped_line(tmp_path, 7, ["one", "two"], 1)
    assert few == "step 7 is skipped: its loss or gradient is not finite; clips one, two"
    many = skipped_line(tmp_path, 7, ["one", "two", "three", "four"], MAX_SKIPPED - 1)
    assert many.endswith("clips one, two, three ...")
    with pytest.raises(UserError, match=f"no finite gradient in {MAX_SKIPPED} steps") as error:
        skipped_line(tmp_path, 7, ["one"], MAX_SKIPPED)
    assert str(tmp_path / "checkpoint.pt") in str(error.value)
