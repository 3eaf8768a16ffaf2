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

@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "sounds"])
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
    assert done.returncode == 2 and "regime-sr.jsonl: missing" in done.stderr
    assert in_process(figures, "portrait", cwd=tmp_path).returncode == 2


def test_a_log_without_densities_is_refused_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "regime-sr.jsonl").write_text('{"step": 32, "r": 0.0, "m": 2.0}\n')
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="regime-sr.jsonl: of an earlier version"):
        figures.density()


# --- what they show

def test_what_r_drives_is_shown_as_shares_of_its_most():
    """lambda and m are 1 - r, lambda 0 past its end; structure's share is r, ramped in."""
    rows = [row for row in stage_log() if "density" in row]
    (steps, lam), (_, m), (of_share, share) = figures.driven_shares(rows).values()
    r = np.array([row["r"] for row in rows])
    assert steps == [row["step"] for row in rows]
    assert np.allclose(lam, np.where(r > 0.9, 0, 1 - r)) and np.allclose(m, 1 - r)
    ramp = np.minimum(1, (np.array(of_share) - FOUND) / 200)
    assert len(share) >= 5 and np.allclose(share, ramp * r[np.isin(steps, of_share)])


def test_the_ends_of_m_are_those_of_the_settings(monkeypatch):
    """Negative control: with other defaults the same log is shown otherwise."""
    rows, shown = [row for row in stage_log() if "density" in row], {}
    ends = [("m_early", float, 3.0), ("m_late", float, 0.0)]
    other = dataclasses.make_dataclass("Other", ends, bases=(Config,))
    for name, settings in (("own", Config), ("other", other)):
        monkeypatch.setattr(figures, "Config", settings)
        (label, (_, m)), = [x for x in figures.driven_shares(rows).items() if "centre" in x[0]]
        shown[name] = m
        assert f"(1: {settings().m_early:g}, 0: {settings().m_late:g})" in label
    m_of_log = [row["density"]["m"] for row in rows]
    assert np.allclose(shown["other"], np.array(m_of_log) / 3) and not np.allclose(*shown.values())


def test_groups_were_found_at_the_check_before_the_structure_loss_has_a_weight():
    rows = stage_log()
    assert figures.groups_found_at(rows) == FOUND
    assert figures.groups_found_at(stage_log(found=None)) is None


def test_the_mechanism_figure_shows_structure_only_where_it_was_logged(recorded):
    fig = figures.mechanism()
    counts = [len(ax.get_lines()) for ax in fig.axes[4:6]]
    assert counts == [2, 3] and len(fig.legends[0].get_texts()) == 3, "sr has no groups, captions have"
    texts = [[text.get_text() for text in ax.texts] for ax in fig.axes[4:6]]
    assert texts == [[], ["groups found"]]
    D = fig.axes[0].get_lines()[0]
    assert D.get_xdata().tolist() == regime.probe_steps(2_000) and D.get_ydata()[0] == pytest.approx(0.9)


def test_densities_are_scipys_of_the_logged_centre_and_width(recorded):
    lines = figures.density().axes[0].get_lines()
    assert len(lines) == 5
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
