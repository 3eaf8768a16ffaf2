"""Claims about which arm is best when: planted crossings are found, noise is not taken for them."""
import numpy as np
from matplotlib.axes import Axes

from lab.best_by_step import best_by_step, best_figure, best_table


def planted(noise: float, seeds: int = 4) -> list[dict]:
    """Arm a leads by 0.2 at step 100, b by 0.2 at step 1,000; on the second axis lower is better."""
    rng, rows = np.random.default_rng(0), []
    ahead = {("a", 100): 0.7, ("b", 100): 0.5, ("a", 1_000): 0.6, ("b", 1_000): 0.8}
    for seed in range(seeds):
        for (arm, step), value in ahead.items():
            quality = value + noise * rng.standard_normal()
            rows.append({"arm": arm, "seed": seed, "step": step, "event_accuracy": quality,
                         "texture_score": 1 - quality})
    return rows


def test_a_planted_crossing_is_found_on_both_axes_whichever_way_they_point():
    found = best_by_step(planted(0.01))
    for metric in ("event_accuracy", "texture_score"):
        assert [(at["step"], at["best"], at["alike"]) for at in found[metric]] == [(100, "a", []),
                                                                                 (1_000, "b", [])]
        assert all(abs(max(at["behind"].values()) - 0.2) < 0.03 for at in found[metric])
    assert abs(found["texture_score"][0]["value"] - 0.3) < 0.02, "as it was, not turned"


def test_in_noise_the_other_arm_can_not_be_told_from_the_best():
    assert all(at["alike"] for at in best_by_step(planted(1.0))["event_accuracy"])


def test_one_seed_has_no_intervals_and_an_unfinished_arm_is_not_compared():
    alone = best_by_step(planted(0.01, seeds=1))
    assert not any(at["alike"] for at in alone["event_accuracy"])
    assert "[" not in best_table(alone).split("brackets")[1]
    late = [{"arm": "c", "seed": 0, "step": 100, "event_accuracy": 1.0}]
    at = best_by_step(planted(0.01) + late)["event_accuracy"][0]
    assert at["best"] == "a" and "c" not in at["behind"]


def test_the_figure_has_a_panel_an_axis_and_tells_any_number_of_arms_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda ax, *points, color, ls, **rest: drawn.append((ax, *color, ls)))
    best_figure(tmp_path / "best.png", best_by_step(planted(0.01)), ["a", "b"], 4)
    assert (tmp_path / "best.png").stat().st_size > 5_000
    assert len(set(drawn)) == 4, "two arms on two axes"
    drawn.clear()
    names = ["m 0, s 1", "m 1, s 1", "m 0, s 2"]
    rows = [{"arm": arm, "seed": 0, "step": step, "val_loss": 1.0} for arm in names for step in (8, 64)]
    best_figure(tmp_path / "best.png", best_by_step(rows), names, 1)
    assert len(set(drawn)) == 3
