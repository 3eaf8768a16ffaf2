"""Claims about tables and figures, on rows of runs that never were."""
import json

import numpy as np
import pytest
from conftest import ROOT
from fabricated import fabricated_rows, half

from lab import tables
from lab.questions import reference_of

SEEDS = [0, 1, 2]


def flat(value, name="") -> dict:
    """Nested lists and dicts -> {path: leaf}; None, which stands for NaN in a file, as NaN."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {name: float("nan") if value is None else value}
    found = {}
    for key, each in value:
        found |= flat(each, f"{name}/{key}")
    return found


def split(leaves: dict) -> tuple[dict, dict]:
    """{path: leaf} -> those that are texts, those that are numbers."""
    texts = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, str)}
    return texts, {path: leaf for path, leaf in leaves.items() if path not in texts}


RECORDED = sorted(path.parent.name for path in ROOT.glob("results/*/summary.json"))


@pytest.mark.parametrize("folder", RECORDED)
def test_a_recorded_summary_is_what_its_rows_give(folder):
    path = ROOT / "results" / folder
    spec = json.loads((path / "experiment.json").read_text())
    rows = [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()]
    found = flat(tables.summarize(rows, spec["arms"], spec["reference"]))
    recorded = flat(json.loads((path / "summary.json").read_text()))
    texts, numbers = split(found)
    assert texts == split(recorded)[0] and len(recorded) > 5
    assert numbers == pytest.approx(split(recorded)[1], rel=1e-9, nan_ok=True)


def test_an_arm_of_a_setting_is_compared_within_its_setting():
    arms = ("home: stage", "home: clock", "away: stage", "away: clock", "stage", "mine")
    references = [reference_of(arm, arms, "stage") for arm in arms]
    assert references == ["home: stage"] * 2 + ["away: stage"] * 2 + ["stage"] * 2

    level = {"home: stage": 0.5, "home: clock": 0.6, "away: stage": 0.3, "away: clock": 0.1}
    rows = fabricated_rows(level, SEEDS, lambda arm, seed: level[arm] + 0.01 * seed)
    summary = tables.summarize(rows, {arm: {} for arm in level}, "stage")
    found = {row["arm"]: row.get("against", {}).get("difference") for row in summary}
    assert found["home: stage"] is None
    assert abs(found["home: clock"] - 0.1) < 1e-9 and abs(found["away: clock"] + 0.2) < 1e-9


def test_what_a_gain_costs_in_other_metrics_is_in_the_table_and_a_metric_that_one_run_lacks_is_not():
    arms = {"static": {}, "stage": {}}
    kid = {"static": 0.1, "stage": 0.14}
    rows = fabricated_rows(arms, SEEDS, half, val_loss=lambda arm, seed, k: 0.9 + 0.01 * seed)
    for row in rows:
        if "final" in row:
            row["final"]["kid"] = kid[row["arm"]] + 0.01 * row["seed"]
            if row["seed"] > 0:
                row["final"]["event_kl"] = 0.2
    found = tables.secondary_metrics(rows, arms, SEEDS, "static")
    assert set(found) == {"stage"} and set(found["stage"]) == {"kid", "val_loss"}
    assert abs(found["stage"]["kid"]["difference"] - 0.04) < 1e-9
    assert found["stage"]["val_loss"]["difference"] == 0
    assert "kid +0.040 [+0.040, +0.040]" in tables.table("E1", rows, arms, SEEDS, "static")


def test_times_to_quality_are_told_of_both_axes_and_of_the_loss_only_where_there_is_nothing_else():
    arms, faster = {"static": {}, "stage": {}}, {"static": 1.0, "stage": 2.0}
    def learns(arm, seed, k):
        return 1 - 2.0 ** (-faster[arm] * k / 40)
    rows = fabricated_rows(arms, SEEDS, half, learns, texture_score_w1=half,
                           val_loss=lambda arm, seed, k: 1 - learns(arm, seed, k))
    sooner = tables.summarize(rows, arms, "static")[1]["sooner"]
    assert list(sooner) == ["event_accuracy", "texture_score_w1"]
    text = tables.table("E1", rows, arms, SEEDS, "static")
    assert "texture at w = 1: steps never in reach (censored)" in text, "a flat curve shares no range"
    assert "at the end 2.00" in text and "3 of 3 reach it" in text
    for row in rows:
        del row["event_accuracy"], row["texture_score_w1"]
    assert list(tables.summarize(rows, arms, "static")[1]["sooner"]) == ["val_loss"]


def test_seconds_are_compared_only_where_every_run_has_some_that_count():
    """An arm that ran on another day keeps its steps and says no seconds."""
    arms = {"static": {}, "clock": {}, "stage": {}}
    rows = fabricated_rows(arms, SEEDS, half, lambda arm, seed, k: 0.01 * k)
    for row in rows:
        if row["arm"] == "clock":
            del row["seconds"]
        elif row["arm"] == "stage":
            row["seconds"] *= 2
    _, clock, stage = tables.summarize(rows, arms, "static")
    assert set(clock["sooner"]["event_accuracy"]) == {"step"}
    found = stage["sooner"]["event_accuracy"]
    assert found["step"]["ratio"] == pytest.approx(1) and found["seconds"]["ratio"] == pytest.approx(0.5)

    # Nor where one pair is of two machines; seeds may be of different ones.
    for row in rows:
        row["machine"] = f"machine {row['seed']}"
    *_, stage = tables.summarize(rows, arms, "static")
    assert "seconds" in stage["sooner"]["event_accuracy"]
    rows[-1]["threads"] = 2
    *_, stage = tables.summarize(rows, arms, "static")
    assert set(stage["sooner"]["event_accuracy"]) == {"step"}


def test_the_more_arms_a_table_compares_the_larger_each_p():
    arms = {"static": {}, "clock": {}, "stage": {}}
    rows = fabricated_rows(arms, range(8), lambda arm, seed: 0.5 + 0.01 * seed * list(arms).index(arm))
    _, clock, stage = (row.get("against") for row in tables.summarize(rows, arms, "static"))
    assert clock["p"] == stage["p"] == 2 / 2**7, "seven of eight differ, all with one sign"
    assert clock["holm_p"] == stage["holm_p"] == 2 * clock["p"]

    # An arm of two seeds can reach no small p: it is called descriptive, and raises nobody else's.
    rows = [row for row in rows if row["arm"] != "stage" or row["seed"] < 2]
    _, clock, stage = (row.get("against") for row in tables.summarize(rows, arms, "static"))
    assert clock["holm_p"] == clock["p"] and "holm_p" not in stage
    text = tables.table("E1", rows, arms, list(range(10)), "static")
    assert "8 of 10 seeds; smallest p that 8 seeds" in text and "DESCRIPTIVE" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("stage  ") and "descriptive" in line]
    assert line.split()[1] == "2"


def test_e5_tells_semantics_from_detail_and_leaves_out_what_was_not_asked():
    """Runs whose recall follows D and whose pitch does not; order was asked of nobody at the first
    evaluations."""
    rng = np.random.default_rng(0)
    arms = [f"run {k}" for k in range(10)]
    steps = (25, 50, 100, 200, 400, 800)
    ahead = {arm: dict(zip(steps, rng.standard_normal(6).cumsum() * 0.05)) for arm in arms}
    free = {arm: dict(zip(steps, rng.standard_normal(6).cumsum() * 0.05)) for arm in arms}
    rows = fabricated_rows(
        arms, [0], half, lambda a, s, k: 0.1 * np.log2(k) + ahead[a][k], steps,
        D=lambda a, s, k: 1 - 0.08 * np.log2(k) - ahead[a][k],
        recall=lambda a, s, k: 0.1 * np.log2(k) + ahead[a][k] + 0.01 * free[a][k],
        pitch=lambda a, s, k: 0.1 * np.log2(k) + free[a][k],
        order=lambda a, s, k: None if k < 400 else 0.5,
    )
    found = tables.track(rows)
    assert found["recall"]["interval"][0] > 0.5 and found["recall"]["points"] == 5
    assert found["pitch"]["interval"][0] < 0.2
    assert "order" not in found
    text = tables.track_table(tables.track(rows))
    assert "recall (semantic)" in text and "pitch (detail)" in text


def test_a_table_says_of_how_many_seeds_commits_and_of_which_range_it_is():
    """Negative control: it says none of it where all is shared."""
    level = {"static": 0.5, "stage": 0.6}
    rows = fabricated_rows(level, SEEDS, lambda arm, seed: level[arm] + 0.01 * seed)
    for row in rows:
        row["commit"] = "aaa" if row["arm"] == "static" else "bbb"
    text = tables.table("E1", rows, {arm: {} for arm in level}, SEEDS, "static")
    assert "rows of 2 commits, aaa, bbb: subtract within a seed only; and there" in text
    assert "pairs are of two commits: 3 of 3 of stage" in text
    for row in rows:
        row["commit"] = "aaa" if row["seed"] else "bbb"
    text = tables.table("E1", rows, {arm: {} for arm in level}, SEEDS, "static")
    assert "rows of 2 commits, aaa, bbb: subtract within a seed only\n" in text
    assert "DESCRIPTIVE: fewer than 8 seeds" in text
    whole = {"ratio": 1.0, "interval": [0.9, 1.1], "n": 8, "of": 8, "shared": 1.0}
    assert "range" not in tables._format_speed_up(whole)
    part = tables._format_speed_up({**whole, "n": 5, "shared": 0.64})
    assert "over 64 % of its range, 5 of 8 seeds" in part
    one = {"correlation": 0.5, "interval": [0.1, 0.9], "p": 0.1, "runs": 7, "points": 5}
    assert "DESCRIPTIVE: fewer than 8 runs" in tables.track_table({"event_accuracy": one})
    assert "DESCRIPTIVE" not in tables.track_table({"event_accuracy": {**one, "runs": 8}})
