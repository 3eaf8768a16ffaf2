"""Claims about both axes at once: planted wins and trades are called so, noise is called nothing."""
import numpy as np
import pytest

from lab.plane import plane, plane_figure, plane_table, verdict

ARMS = {"static": {}, "better": {}, "trade": {}, "same": {}}
SHIFT = {"static": (0, 0), "better": (0.1, 0.0), "trade": (0.1, 0.1), "same": (0, 0)}


def rows(seeds: int = 8) -> list[dict]:
    """`better` has more event sets, `trade` buys them with texture (lower is better)."""
    rng, out = np.random.default_rng(0), []
    for seed in range(seeds):
        for arm, (events, texture) in SHIFT.items():
            at = {"event_accuracy": 0.6 + events + 0.01 * rng.standard_normal(),
                  "texture_score": 0.3 + texture + 0.01 * rng.standard_normal()}
            out.append({"arm": arm, "seed": seed, "step": 10, "final": {"exact": 0.5},
                        "axes": {"w": 2.5, "by_w": {}, "w1": at, "tuned": at}})
    return out


def test_wins_trades_and_ties_are_told_from_one_another():
    found = {row["arm"]: row for row in plane(rows(), ARMS, "static") if row["view"] == "tuned"}
    assert "verdict" not in found["static"], "the reference is compared with nobody"
    assert {arm: row["verdict"] for arm, row in found.items() if arm != "static"} == {
        "better": "wins", "trade": "trades", "same": "not told apart"}
    assert abs(found["better"]["axes"][0]["against"]["difference"] - 0.1) < 0.02


@pytest.mark.parametrize("differences, said", [
    ([((0.1, 0.2), 1), ((-0.1, 0.1), -1)], "wins"),
    ([((-0.1, 0.1), 1), ((-0.2, -0.1), -1)], "wins"),
    ([((-0.1, 0.1), 1), ((0.1, 0.2), -1)], "loses"),
    ([((0.1, 0.2), 1), ((0.1, 0.2), -1)], "trades"),
    ([((-0.1, 0.2), 1), ((-0.1, 0.2), -1)], "not told apart"),
])
def test_the_sign_of_a_verdict_follows_the_metric(differences, said):
    assert verdict(differences) == said


def test_one_seed_has_no_verdict_and_few_are_descriptive():
    assert not any("verdict" in row for row in plane(rows(1), ARMS, "static"))
    few = plane_table(plane(rows(3), ARMS, "static"))
    assert ": descriptive" in few and not any(word in few.partition("shown")[2] for word in ("wins", "loses"))
    assert "descriptive" not in plane_table(plane(rows(8), ARMS, "static"))
    two_pairs = [row for row in rows(8) if row["arm"] != "static" or row["seed"] < 2]
    assert "descriptive" in plane_table(plane(two_pairs, ARMS, "static")), "of eight runs two are paired"


def test_super_resolution_is_read_off_the_final_table_and_drawn(tmp_path):
    restored = [{"arm": arm, "seed": seed, "step": 9, "final": {"energy_score": 0.4 + 0.1 * (arm == "a"),
                                                                 "lsd_hf": 1.0}}
                for arm in "ab" for seed in range(3)]
    found = plane(restored, {"a": {}, "b": {}}, "a")
    assert [row["view"] for row in found] == ["final", "final"] and found[1]["verdict"] == "wins"
    plane_figure(tmp_path / "plane.png", found + plane(rows(), ARMS, "static"))
    assert (tmp_path / "plane.png").stat().st_size > 5_000
