"""Claims about learning curves, on rows of runs that never were."""
import numpy as np
import pytest
from fabricated import fabricated_rows, half

from lab import learning_curves
from lab.statistics import interval
from lab.tables import METRICS
from parts.spectrograms import pyplot

ARMS = {"static": {}, "stage": {}}
STYLES = learning_curves.arm_styles(ARMS)


@pytest.fixture
def ax():
    plt = pyplot()
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def behind(arm, seed, k) -> float:
    """A level that seeds share with their reference, from which `stage` is seed / 100 below."""
    return 0.1 * np.log2(k) + 0.05 * seed - (arm == "stage") * seed / 100


def test_a_difference_is_from_the_same_seed_and_at_steps_that_all_runs_have():
    rows = fabricated_rows(ARMS, [1, 2], half, behind)
    rows += fabricated_rows(["static"], [3], half, behind)          # a seed that only one of the two has
    rows = [r for r in rows if (r["arm"], r["seed"], r["step"]) != ("stage", 2, 20)]
    steps, values = learning_curves.differences(rows, "stage", "static", "event_accuracy")
    assert steps == [10, 40, 80]
    assert np.allclose(values, [[-0.01] * 3, [-0.02] * 3])


def test_arms_without_a_common_seed_have_no_difference(ax):
    rows = fabricated_rows(["static"], [0], half, behind) + fabricated_rows(["stage"], [1], half, behind)
    steps, values = learning_curves.differences(rows, "stage", "static", "event_accuracy")
    assert steps == [] and values.shape == (0, 0)
    learning_curves.draw_differences(ax, rows, ARMS, "static", "event_accuracy", STYLES)
    assert len(ax.lines) == 1, "the line at 0 alone"


def test_two_runs_are_two_lines_and_three_are_a_mean_in_its_band(ax):
    x, y = np.array([1, 2]), np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 8.0]])
    learning_curves.draw_runs(ax, x, y[:2], "two", "C0")
    drawn = [line.get_ydata() for line in ax.lines if line.get_marker() == "None"]
    assert np.array_equal(drawn, y[:2]) and not ax.collections
    ax.clear()
    learning_curves.draw_runs(ax, x, y, "three", "C0")
    (mean,) = [line.get_ydata() for line in ax.lines if line.get_marker() == "None"]
    (band,) = ax.collections
    assert np.allclose(mean, [1, 4])
    at_2 = [point[1] for point in band.get_paths()[0].vertices if point[0] == 2]
    assert np.allclose([min(at_2), max(at_2)], interval(y[:, 1])[1:])
    ax.clear()
    learning_curves.draw_runs(ax, x[1:], y[:, 1:], "a single step: the interval as a bar", "C0")
    (bar,) = [c.get_segments()[0][:, 1] for c in ax.collections if hasattr(c, "get_segments")]
    assert np.allclose(bar, interval(y[:, 1])[1:])


def test_differences_are_drawn_over_the_second_half_of_the_doublings(ax):
    rows = fabricated_rows(ARMS, [1], half, behind, steps=(16, 64, 256, 1024))
    learning_curves.draw_differences(ax, rows, ARMS, "static", "event_accuracy", STYLES)
    drawn = [list(line.get_xdata()) for line in ax.lines]
    assert drawn == [[256, 1024], [256, 1024], [0, 1]], "points, their line, the line at 0"
    assert ax.get_title() == "above 0: better than static"


@pytest.mark.parametrize("metric, label", [
    ("event_accuracy", "event sets\n(higher is better)"), ("lsd_hf", "LSD-HF\n(lower is better)"),
    ("r", "regime r")])
def test_a_label_says_which_way_is_better(metric, label):
    assert learning_curves.axis_label(metric) == label
    assert all(learning_curves.axis_label(name) for name in METRICS)


def test_an_arm_looks_the_same_whatever_stands_beside_it_and_no_two_look_alike():
    many = ["stage", *(f"setting {k}" for k in range(27)), "static"]
    styles = learning_curves.arm_styles(many)
    assert len(set(styles.values())) == len(many)
    for known in ("static", "stage"):
        assert styles[known] == learning_curves.arm_styles([known])[known]


def test_r_is_drawn_of_arms_that_follow_it_alone(tmp_path, monkeypatch):
    rows = fabricated_rows(ARMS, [0, 1, 2], half, r=lambda arm, seed, k: 0.5 * (arm == "stage"))
    drawn, draw = {}, learning_curves.draw_arms
    monkeypatch.setattr(learning_curves, "draw_arms", lambda ax, rows, arms, metric, *rest: (
        drawn.update({metric: list(arms)}), draw(ax, rows, arms, metric, *rest)))
    learning_curves.learning_figure(tmp_path / "a.png", "E1", rows, ARMS, "static")
    assert drawn["r"] == ["stage"] and drawn["event_accuracy"] == list(ARMS)


def test_a_figures_title_has_the_fewest_and_the_most_seeds_of_its_arms():
    def title(**seeds):
        rows = [{"arm": arm, "seed": seed} for arm, n in seeds.items() for seed in range(n)]
        return learning_curves.basis(rows, {"static": {}, "stage": {}, "to come": {}})

    assert title(static=8, stage=2) == "2 to 8 seeds; bands: 95 %; arms of fewer than 8 seeds are descriptive"
    assert title(static=3, stage=2) == "2 to 3 seeds: descriptive"
    assert title(static=8, stage=8) == "8 seeds; bands: 95 %"
    assert title(static=1) == "1 seed: descriptive"


def test_a_figure_is_drawn_of_runs_with_seconds_and_without_and_of_none_at_all(tmp_path):
    rows = fabricated_rows(ARMS, [0, 1, 2], half, behind, texture_score_w1=half, recall=half,
                           order=lambda arm, seed, k: None if k == 10 else 0.5)
    for row in rows:
        if row["arm"] == "stage":
            del row["seconds"]
    learning_curves.learning_figure(tmp_path / "a.png", "E1", rows, ARMS, "static")
    assert (tmp_path / "a.png").stat().st_size > 20_000
    learning_curves.learning_figure(tmp_path / "b.png", "E1", [], ARMS, "static")
    assert not (tmp_path / "b.png").exists()
