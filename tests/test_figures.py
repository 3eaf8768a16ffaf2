"""Claims about the figures: each is drawn from the records, and says which of them is missing."""
import dataclasses
import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import in_process
from matplotlib import pyplot as plt

import regime
import structure_reg
import train
from lab import figures
from parts.config import Config
from parts.errors import UserError

OF_RUNS = {"mechanism": ("sr", "t2a"), "density": ("sr",), "blocks": ("t2a-deep",)}  # figure -> its logs
FOUND = 431  # step at which the fabricated run accepts its groups


def stage_log(K: int = 2_000, found: int | None = FOUND) -> list[dict]:
    """A log of train.py's format, of a stage run that never was: r rises with log k, what it drives is
    said by train.drive, groups of eight blocks are accepted at step `found`."""
    cfg, detector, rows = Config(steps=K, depth=8), structure_reg.GroupDetector(8), []
    steps = regime.probe_steps(K)
    S = structure_reg.similarity(structure_reg.signatures(structure_reg.demo_blocks(8, 3)))
    check = {"S": S.round(4).tolist(), "groups": [0, 1, 2, 0, 1, 2, 0, 1], "p": 0.025, "p_depth": 0.01,
             "contrast": 0.1, "rand_index": 1.0, "streak": 2}
    for k in steps:
        if k == found:
            detector.activated_at, detector.groups, detector.ratio = k, check["groups"], 0.5
        r = float(np.log2(k / steps[0]) / np.log2(steps[-1] / steps[0]))
        driven = train.drive(cfg, r, k, detector)
        D = {name: 0.9 - 0.5 * r for name in regime.LEVELS}
        row = {"step": k, "loss": 1.0, "r": r, "lambda": driven.lam, "mu": driven.mu, "D_of": D,
               "density": dataclasses.asdict(driven.density), "D": regime.signal("levels", D)}
        if driven.share:
            row["struct_share"] = driven.mu * detector.ratio
        rows.append(row | {"structure": check})
        if k == 256:  # lines between two probes hold neither D nor S; those of evaluations hold nothing
            between = {name: row[name] for name in ("r", "lambda", "mu", "density")}
            rows += [{"step": 260, **between}, {"step": 260, "eval": {}}]
    return rows


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Fabricated logs in the place of the recorded ones."""
    for name in ("sr", "t2a", "t2a-deep"):
        rows = stage_log(found=None if name == "sr" else FOUND)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"regime-{name}.jsonl").write_text(lines)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    yield tmp_path
    plt.close("all")


def of_another_version(name: str) -> bool:
    """Was a log that this figure is of recorded without the densities?"""
    files = [figures.RESULTS / f"regime-{run}.jsonl" for run in OF_RUNS.get(name, ())]
    return any('"density"' not in file.read_text() for file in files)


# --- the files

@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name not in ("sounds", "decoder")])
def test_figures_are_drawn_from_what_is_recorded(name, tmp_path):
    if of_another_version(name):
        pytest.skip("its log was recorded without the density of timesteps")
    done = in_process(figures, name, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / f"{name}.png").stat().st_size > 5_000, done.stderr


@pytest.mark.parametrize("name", OF_RUNS)
def test_the_figures_of_a_run_are_drawn_from_its_log(name, recorded):
    done = in_process(figures, name, "--out", recorded, cwd=recorded)
    assert done.returncode == 0 and (recorded / f"{name}.png").stat().st_size > 5_000, done.stderr


def test_a_figure_without_its_record_says_which_file(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    done = in_process(figures, "mechanism", cwd=tmp_path)
    assert done.returncode == 2 and "regime-t2a.jsonl: missing" in done.stderr
    assert in_process(figures, "portrait", cwd=tmp_path).returncode == 2


def test_a_log_without_densities_is_refused_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "regime-sr.jsonl").write_text('{"step": 32, "r": 0.0, "m": 2.0}\n')
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="regime-sr.jsonl: of an earlier version"):
        figures.density()


# --- what they show

def test_what_r_drives_is_shown_as_it_was_logged():
    """lambda = 0.5 (1 - r), 0 past its end; m = 2 - r; structure's share 0.15 r, ramped in, 0 before."""
    rows = [row for row in stage_log() if "density" in row]
    (steps, lam), (_, m), (of_share, share) = figures.driven_curves(rows)
    r = np.array([row["r"] for row in rows])
    assert steps == [row["step"] for row in rows]
    assert np.allclose(lam, np.where(r > 0.9, 0, 0.5 * (1 - r))) and np.allclose(m, 2 - r)
    ramp = np.clip((np.array(of_share) - FOUND) / 200, 0, 1)
    assert max(share) > 0.1 and np.allclose(share, 0.15 * ramp * r[np.isin(steps, of_share)])
    assert set(figures.driven_curves([row for row in stage_log(found=None) if "density" in row])[2][1]) == {0}


def test_groups_were_found_at_the_check_before_the_structure_loss_has_a_weight():
    rows = stage_log()
    assert figures.groups_found_at(rows) == FOUND
    assert figures.groups_found_at(stage_log(found=None)) is None


def test_the_mechanism_figure_shows_one_curve_a_panel_and_says_why_structure_is_off(recorded):
    fig = figures.mechanism()
    counts = [len(ax.get_lines()) for ax in fig.axes]
    assert counts == [1] * 8 + [2, 1], "a dotted line where groups are found"
    texts = [[text.get_text() for text in ax.texts] for ax in fig.axes[8:]]
    assert texts == [["groups found"], ["off: too few blocks to test for groups"]], "captions, sr"
    D = fig.axes[0].get_lines()[0]
    assert D.get_xdata().tolist() == regime.probe_steps(2_000) and D.get_ydata()[0] == pytest.approx(0.9)


def test_a_time_to_quality_says_of_how_many_seeds_it_is_and_why_there_is_none():
    fig = figures.sooner()
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert labels[0] == "vanilla\n5 of 8 seeds" and labels[1].endswith("8 of 8 seeds")
    texts = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert texts.count("run on another day: not compared") == 1
    assert texts.count("never in reach of static") == 2, "steps and seconds of vanilla on ESC-10"
    plt.close(fig)


def test_densities_are_scipys_of_the_logged_centre_and_width(recorded):
    lines = figures.density().axes[0].get_lines()
    assert len(lines) == 6, "four moments; vanilla and static"
    for line in lines:
        t, m = line.get_xdata(), float(line.get_label().rpartition("= ")[2])
        normal = scipy.stats.norm(m, 1).pdf(scipy.special.logit(np.asarray(t, float)))
        exact = 0.9 * normal / (t * (1 - t)) + 0.1
        assert np.allclose(line.get_ydata(), exact, atol=0.02), "m is rounded in the label"
    assert not np.allclose(lines[0].get_ydata(), lines[3].get_ydata(), atol=0.1)


def test_blocks_are_shown_with_both_p_in_the_order_of_their_groups(recorded):
    fig = figures.blocks()
    panels = fig.axes[:3]
    titles = [ax.get_title() for ax in panels]
    assert all("p = 0.025 (axes), 0.010 (depth)" in title for title in titles)
    assert titles[1].startswith(f"step {FOUND}:"), "when the groups were accepted"
    shown = [int(label.get_text()) for label in panels[0].get_xticklabels()]
    assert shown == [1, 4, 7, 2, 5, 8, 3, 6]
