"""Claims about the choice of the regime's signal: it finds the planted one, and says when none is good."""
import json
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process

import regime
from lab import regime_choice as C
from parts.errors import UserError

K = 4_096
KINDS = [kind for kind in regime.SIGNALS if kind != "latent"]


def falls_until(k: np.ndarray, end: int, noise: float, rng) -> np.ndarray:
    """D that falls by 0.08 a doubling until step `end`."""
    return 1 - 0.08 * np.log2(np.minimum(k, end)) / 2 + noise * rng.standard_normal(len(k))


def fabricate(task: str, seed: int, good: str = "t0.7", lr: float = 2e-3) -> tuple[dict, list[dict]]:
    """A recording: progress is complete at step 512; only the D called `good` stops falling there."""
    rng = np.random.default_rng(seed)
    steps = np.array(regime.probe_steps(K))
    names = [name + how for name in regime.PREDICTIONS for how in ("", "-pooled")]
    D = {name: falls_until(steps, 512 if name == good else 64, 0.002, rng) for name in names}
    rows = [{"step": int(k), "r": 0.0, "D_of": {name: float(D[name][n]) for name in names}}
            for n, k in enumerate(steps)]
    for row in rows:
        if row["step"] >= 64 and np.log2(row["step"]) % 1 == 0:
            row["progress"] = 0.1 if row["step"] <= 512 else 0.95
    header = {"task": task, "seed": seed, "lr": lr, "steps": K}
    return header, rows


@pytest.fixture(scope="module")
def recorded():
    return [fabricate(task, seed) for task in ("t2a", "sr") for seed in range(3)]


def test_the_signal_that_stops_where_progress_stops_is_chosen(recorded):
    found = C.choose(recorded)
    assert found["chosen"] == "t0.7"
    assert all(run["signal"] == "t0.7" for run in found["left_out"])
    errors = {kind: row["t2a"] for kind, row in found["signals"].items()}
    assert errors["t0.7"] == min(errors.values()) and set(errors) == set(KINDS)


def test_a_run_is_judged_by_the_signal_that_the_others_choose(recorded):
    """Negative control: one run in which another signal is right does not choose for itself."""
    odd = fabricate("t2a", 9, good="sample")
    found = C.choose([*recorded, odd])
    judged = found["left_out"][-1]
    assert judged["signal"] == "t0.7" and judged["error"] > C.BOUNDS["t2a"]
    assert "NOT within 0.12" in C.choice_text(found)


def test_r_of_a_recording_is_that_of_the_regime_fed_by_hand(recorded):
    _, rows = recorded[0]
    steps, r = C.r_of(rows, "t0.7")
    by_hand = regime.Regime("slope", K)
    for row in rows:
        by_hand.update(row["step"], row["D_of"]["t0.7"])
        assert r[list(steps).index(row["step"])] == by_hand.r(row["step"])


def test_probes_between_those_of_the_regime_are_passed_over(recorded):
    """A recording with more probes gives the same r."""
    _, rows = recorded[0]
    more = sorted([*rows, {"step": 50, "D_of": rows[0]["D_of"]}], key=lambda row: row["step"])
    assert np.array_equal(C.r_of(rows, "levels"), C.r_of(more, "levels"))


def test_error_and_back_are_those_of_the_definition():
    rows = [{"step": k, "progress": p} for k, p in ((64, 0.2), (128, 0.1), (256, 0.9))]
    steps, r = np.array([32, 100, 200]), np.array([0.0, 0.5, 0.4])
    # isotonic: .15, .15, .9; r held: 0, .5, .4
    assert C.error(rows, steps, r) == pytest.approx(np.mean([0.15, 0.35, 0.5]))
    assert C.back(r) == pytest.approx(0.1) and C.back(np.array([0.0, 0.2, 0.9])) == 0


def test_check_counts_the_wrong_side_and_the_spread_over_seeds():
    def driven(seed, r_late):
        D_of = dict.fromkeys(("t0.9", "t0.7", "t0.5"), r_late / 2)
        rows = [{"step": 32, "r": 0.0, "D_of": D_of}, {"step": 64, "r": 0.35, "D_of": D_of, "progress": 0.1},
                {"step": 1_000, "r": r_late, "D_of": D_of, "progress": 0.9}]
        return {"task": "sr", "seed": seed, "lr": 1e-3, "steps": 1_000}, rows
    found = C.check([driven(0, 0.5), driven(1, 0.9)])["sr"]
    assert [run["too_early"] for run in found["runs"]] == [1, 1]
    assert [run["too_late"] for run in found["runs"]] == [1, 0]
    assert found["rates"]["0.001"]["spread"] == pytest.approx(np.std([0.5, 0.9], ddof=1))
    assert found["ranges"] == {64: {"D": [0.25, 0.45], "r": [0.35, 0.35], "progress": [0.1, 0.1]}}
    assert "too early at 1, too late at 1" in C.check_text({"sr": found})


def test_controls_are_the_clocks_errors_and_those_of_the_other_runs():
    """A clock is right where progress is k / K, and wrong where all is done at once."""
    at = [64, 256, 1_024]
    linear = [{"step": k, "progress": k / 1_024} for k in at]
    at_once = [{"step": k, "progress": 1.0} for k in at]
    assert C.controls([linear, linear]) == pytest.approx(
        {"clock": 0, "clock in log k": np.mean([0.2 - 0.0625, 0.6 - 0.25, 0]), "other seeds' progress": 0})
    found = C.controls([linear, at_once])
    assert found["clock"] == pytest.approx(np.mean([0.9375, 0.75, 0]) / 2)
    assert found["other seeds' progress"] == pytest.approx(np.mean([0.9375, 0.75, 0]))


def test_a_run_folder_becomes_a_small_file(t2a_run, tmp_path):
    """Progress is the event accuracy as a share of the ceiling's; D and r are those of the log."""
    folder = tmp_path / "run"
    shutil.copytree(t2a_run, folder)
    probe = {"step": 5, "r": 0.123456, "D": 0.5, "D_of": {"t0.9": 0.1234567}, "agreement": 0.2}
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(probe) + "\n")
    scores = json.loads((folder / "scores.json").read_text())
    ceiling = next(row for row in next(iter(scores.values()))["rows"] if row["row"] == "codec ceiling")
    evaluated = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()
                 if "eval" in line]

    header, *rows = C.record(folder)
    assert header["task"] == "t2a" and header["steps"] == 12
    progress = {row["step"]: row["progress"] for row in rows if "progress" in row}
    assert progress == pytest.approx({line["step"]: line["eval"]["event_accuracy"]
                                      / ceiling["exact"] for line in evaluated}, abs=1e-3)
    probed = next(row for row in rows if "D_of" in row)
    assert probed == {"step": 5, "r": 0.12346, "D_of": {"t0.9": 0.12346}, "agreement": 0.2}

    # A discrepancy that was not finite is null in the log, and no probe here.
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({**probe, "step": 6, "D": None, "D_of": {"t0.9": None}}) + "\n")
    assert [row.get("D_of") for row in C.record(folder)[1:] if row["step"] in (5, 6)] == [
        probed["D_of"], None]


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n')
    made = in_process(C, "choose", tmp_path / "x.jsonl", cwd=ROOT)
    assert made.returncode == 2 and "x.jsonl: not a file of `record`" in made.stderr


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    made = in_process(C, "check", "none.jsonl", cwd=tmp_path)
    assert made.returncode == 2
    fix = "make it with: python -m lab.regime_choice record RUN --out ."
    assert made.stderr == f"error: none.jsonl: no such file; {fix}\n"


@pytest.mark.parametrize("argv, message", [
    (("record", "runs/a"), "required: --out"),
    (("record", "runs/a", "--out", "x.jsonl"), "--out x.jsonl: must be a folder"),
    (("record", "a/run", "b/run", "--out", "x"), "two runs have folders of one name"),
    (("check", "x.jsonl", "--out", "x.txt"), "--out x.txt: must be named NAME.json"),
    (("means", "runs/a", "runs/b"), "runs/b: one argument too many"),
])
def test_bad_arguments_end_with_status_2_and_one_line(tmp_path, argv, message):
    (tmp_path / "x.jsonl").touch()
    made = in_process(C, *argv, cwd=tmp_path)
    assert made.returncode == 2 and message in made.stderr and made.stderr.count("\n") == 1


def test_help_shows_the_commands_as_they_are_typed(tmp_path):
    shown = in_process(C, "--help", cwd=tmp_path).stdout
    assert "def-sr-s*.jsonl \\\n        results/regime/default-6000/*.jsonl --out" in shown


class Repeated:
    """Twelve clips of each of four captions. What a caption says: a waveform, to which each clip adds noise;
    or the envelope of a noise that is each clip's own."""

    def __init__(self, waveform: bool):
        self.waveform = waveform

    def caption(self, i):
        return f"sound {i % 4}"

    def wave(self, i):
        said = np.random.default_rng(100 + i % 4).standard_normal(60)
        own = np.random.default_rng(i).standard_normal(60)
        return (said + own if self.waveform else 3 * np.abs(said) * own).astype(np.float32)


@pytest.mark.parametrize("waveform, features, rises", [(True, torch.Tensor.clone, False),
                                                       (False, torch.Tensor.abs, True)])
def test_d_of_a_mean_falls_where_sounds_are_alike_and_rises_where_their_texture_is(
        monkeypatch, waveform, features, rises):
    """Negative control: the measure itself does not make means look bad."""
    monkeypatch.setattr(C.data, "open_set", lambda *a: Repeated(waveform))
    monkeypatch.setattr(C, "load_teacher", lambda: None)
    monkeypatch.setattr(C, "TeacherFeatures", lambda codec, teacher: features)
    codec = types.SimpleNamespace(encode=lambda wav: wav.reshape(len(wav), 2, 30))
    found = C.means(types.SimpleNamespace(config={}, codec=codec), clips=48, draws=40)
    frames = [found[n]["frames"] for n in (1, 2, 4, 8)]
    assert found[1]["captions"] == 4
    assert np.all(np.diff(frames) > 0) if rises else np.all(np.diff(frames) < 0)


# --- is a run normal?

def test_a_further_run_lies_in_the_band_with_the_probability_that_is_said():
    """Of 4,000 draws of a sixth value after five, 95 % are inside. Negative control: the range of the five
    holds two thirds."""
    x = np.random.default_rng(0).standard_normal((6, 4_000))
    low, high = C._prediction(x[:5])
    assert abs(np.mean((low < x[5]) & (x[5] < high)) - 0.95) < 0.01
    assert abs(np.mean((x[:5].min(0) < x[5]) & (x[5] < x[:5].max(0))) - 2 / 3) < 0.03


def test_the_band_is_of_the_commonest_rate_and_follows_r_to_what_it_drives(recorded):
    """lambda and m fall while r rises, so their ends change places; two runs alone have no band."""
    found = C.normal([*recorded, fabricate("t2a", 9, lr=1e-3)])
    assert {task: band["runs"] for task, band in found.items()} == {"t2a": 3, "sr": 3}
    band = found["t2a"]
    assert band["setting"]["lr"] == 2e-3 and "seed" not in band["setting"]
    assert band["steps"] == regime.probe_steps(K) and band["r"] == [[0.0] * len(band["steps"])] * 2
    assert set(band["lambda"][0]) == set(band["lambda"][1]) == {0.5} and set(band["m"][0]) == {2.0}
    D = [[regime.signal("levels", row["D_of"]) for row in rows] for header, rows in recorded[:3]]
    assert all(low < min(of) and max(of) < high for low, high, of in zip(*band["D"], zip(*D)))
    assert "step    64, 3 runs: D" in C.normal_text(found)
    with pytest.raises(UserError, match="2 runs of task t2a"):
        C.normal(recorded[:2])


def run_whose_progress_follows(D_of: str, seed: int) -> tuple[dict, list[dict]]:
    """A recording in which progress rises, at a pace of its own, where one D falls; the others fall at paces
    that have nothing to do with it."""
    rng, steps = np.random.default_rng(seed), [64 * 2**n for n in range(7)]
    fallen = {name: np.cumsum(rng.uniform(0.02, 0.10, len(steps))) for name in regime.LEVELS}
    rows = [{"step": k, "r": 0.0, "progress": float(1.5 * fallen[D_of][n] + 0.005 * rng.standard_normal()),
             "D_of": {name: float(1 - fallen[name][n]) for name in fallen}} for n, k in enumerate(steps)]
    return {"task": "t2a", "seed": seed, "lr": 2e-3, "steps": 4_096}, rows


def test_the_discrepancy_that_progress_follows_is_told_from_others_that_fall_as_far():
    found = C.track([run_whose_progress_follows("t0.7", seed) for seed in range(12)])["t2a"]
    assert found["t0.7"]["interval"][0] > 0.8 and found["t0.7"]["p"] < 0.01
    assert set(found) == {"t0.9", "t0.7", "t0.5", "levels"}
    for other in ("t0.9", "t0.5"):
        assert found[other]["interval"][0] < 0 < found[other]["interval"][1]
    assert 0.3 < found["levels"]["correlation"] < 0.9, "the mean of three, of which one is followed"
    assert "t2a  t0.7" in C.track_text({"t2a": found})


def test_track_refuses_what_has_too_little_in_common():
    recorded = [run_whose_progress_follows("t0.7", seed) for seed in range(3)]
    with pytest.raises(UserError, match="track: 2 runs of task t2a with 7 common evaluations; three or more"):
        C.track(recorded[:2])
    header, rows = recorded[0]
    with pytest.raises(UserError, match="track: 3 runs of task t2a with 2 common evaluations"):
        C.track([(header, rows[:2]), *recorded[1:]])


def test_progress_in_super_resolution_goes_from_the_mean_spectrum_to_the_codecs_ceiling(sr_run, monkeypatch):
    rows = {name: [{"energy_score": score}, {"energy_score": score + 2}]
            for name, score in (("input", 8), ("mean spectrum", 4), ("ridge", 2), ("codec ceiling", 1))}
    monkeypatch.setattr(C, "superresolution_references", lambda *a: (None, None, rows))
    assert C._references(C.evaluate.load_run(sr_run), 2) == (5.0, 2.0, "energy_score")
