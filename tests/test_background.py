"""Claims about work whose result nobody waits for."""
import os

import pytest

from parts import background


def note(path, text) -> None:
    """Append a line, with the process that did it."""
    with open(path, "a") as file:
        file.write(f"{text} {os.getpid()}\n")


def fail() -> None:
    raise ValueError("no axis")


def test_beside_a_gpu_calls_are_made_in_order_by_one_other_process_and_errors_come_back(tmp_path):
    there = background.Background("cuda")
    for text in "abc":
        there(note, tmp_path / "x", text)
    there(fail)
    with pytest.raises(ValueError, match="no axis"):
        there.finish()
    lines = (tmp_path / "x").read_text().split()
    assert lines[::2] == ["a", "b", "c"] and len(set(lines[1::2])) == 1 and lines[1] != str(os.getpid())
    there.finish()


def test_elsewhere_they_are_made_at_once(tmp_path):
    here = background.Background("cpu")
    here(note, tmp_path / "x", "a")
    assert (tmp_path / "x").read_text() == f"a {os.getpid()}\n"
    with pytest.raises(ValueError):
        here(fail)
    here.finish()
