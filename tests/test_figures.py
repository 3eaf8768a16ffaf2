"""Claims about the figures: each is drawn from the records, and says which of them is missing."""
import pytest
from conftest import in_process

from lab import figures


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "sounds"])
def test_figures_are_drawn_from_what_is_recorded(name, tmp_path):
    """And say what is missing where it is not."""
    done = in_process(figures, name, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / f"{name}.png").stat().st_size > 5_000, done.stderr


def test_a_figure_without_its_record_says_which_file(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    done = in_process(figures, "mechanism", cwd=tmp_path)
    assert done.returncode == 2 and "regime-sr.jsonl: missing" in done.stderr
    assert in_process(figures, "portrait", cwd=tmp_path).returncode == 2
