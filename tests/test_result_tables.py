"""Claims about the tables of README and docs/results.md: they say what the files in results/ say."""
import json
import shutil

import pytest
from fabricated import fabricated_rows

from lab import result_tables
from parts.errors import UserError


def test_the_pages_say_what_the_files_say():
    marks = 0
    for page in result_tables.PAGES:
        text = (result_tables.ROOT / page).read_text()
        marks += text.count("<!-- table: ")
        assert result_tables.filled(text, page) == text, "python -m lab.result_tables"
    assert marks >= len(result_tables.TABLES)


def test_a_number_that_changes_in_a_file_changes_in_the_page(tmp_path, monkeypatch):
    """Negative control of the test above: the difference of one arm, moved."""
    for folder in result_tables.FIRST.values():
        shutil.copytree(result_tables.RESULTS / folder, tmp_path / folder)
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    before = result_tables.first()
    path = tmp_path / "e1" / "summary.json"
    summary = json.loads(path.read_text())
    stage = next(row for row in summary if row["arm"] == "stage")
    stage["against"]["difference"] += 0.5
    path.write_text(json.dumps(summary))
    after = result_tables.first()
    assert after != before and f"{stage['against']['difference']:+.3f}" in after
    path.unlink()
    with pytest.raises(UserError, match="summary.json: missing"):
        result_tables.first()


def test_cells_say_what_was_not_reached_and_what_was_not_compared():
    assert result_tables._sooner({"step": {"n": 0, "of": 8}}) == "never in reach; 0 of 8"
    steps = {"n": 5, "of": 8, "ratio": 0.5, "interval": [0.25, 1.0]}
    assert result_tables._sooner({"step": steps}) == "0.50 [0.25, 1.00]; not compared; 5 of 8"


def test_an_answer_is_the_first_arm_minus_the_second_and_empty_where_one_was_not_run():
    """stage is 0.25 above clock on every seed, and reaches each quality in half of the steps."""
    def final(arm, seed):
        return (0.75 if arm == "stage" else 0.5) + 0.001 * seed

    def curve(arm, seed, k):
        return k / (80 if arm == "stage" else 160)
    for n, ending in ((8, ", p = 0.008"), (3, ", p = 0.250, 3 seeds")):
        rows = fabricated_rows(("stage", "clock"), range(n), final, curve)
        difference, sooner = result_tables._answer(rows, "stage", "clock")
        assert difference == "**+0.250 [+0.250, +0.250]**" + ending and sooner == "**2.00 [2.00, 2.00]**"
        assert result_tables._answer(rows, "clock", "stage")[0].startswith("**-0.250 ")
        assert result_tables._answer(rows, "stage", "static") == ["", ""]
    open_ended = {"difference": 0.1, "interval": [-0.1, 0.3]}
    assert result_tables._told_apart(open_ended) == "+0.100 [-0.100, +0.300]"


@pytest.mark.parametrize("text, why", [
    ("<!-- table: nothing -->\n\n<!-- end -->",
     "table 'nothing': must be one of short, answers, first, full, full_sr, screen"),
    ("<!-- table: first -->\n| a |\n", "a table without <!-- end -->"),
])
def test_a_mark_that_can_not_be_filled_is_an_error_that_names_the_page(text, why):
    with pytest.raises(UserError, match=f"a page.md: {why}"):
        result_tables.filled(text, "a page.md")
