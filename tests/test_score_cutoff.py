"""Claims about the table that says how often a band limit is found."""
import json

import numpy as np
import pytest
from conftest import in_process

from lab import score_cutoff
from lab.score_cutoff import KINDS, muffle, score_clips, true_limit
from parts.audio import RATE, write_wav


def noise(seconds=1.5, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize("kind, least, most", [
    ("original", 8_000, 8_000), ("low-pass 3000", 3_000, 3_000), ("own rate 11025", 5_512.5, 5_512.5),
    ("mp3 24 at 16000", 5_000, 6_250), ("mp3 24 at 22050", 5_000, 6_500),
    ("mp3 64 at 44100", 8_000, 8_000),
])
def test_the_true_limit_of_muffled_noise_is_where_the_muffling_stops(kind, least, most):
    x = noise()
    y, rate = muffle(x, kind, 0)
    assert least <= true_limit(x, y, kind) <= most
    assert rate == (int(kind.split()[-1]) if kind[0] in "mo" and kind != "original" else RATE)


def test_a_limit_where_there_was_nothing_to_remove_counts_as_unknowable():
    """What was muffled at 2 kHz has nothing that a low-pass at 4 kHz could remove."""
    x, _ = muffle(noise(), "low-pass 2000", 0)
    y, _ = muffle(x, "low-pass 4000", 0)
    assert true_limit(x, y, "low-pass 4000") is None
    assert true_limit(np.zeros(RATE), np.zeros(RATE), "own rate 8000") is None


def test_false_alarms_and_errors_are_counted_by_a_detector_that_always_says_2_khz(monkeypatch):
    """Oracle: of noise its limit is right at 2 kHz, wrong elsewhere, and a false alarm in originals."""
    monkeypatch.setattr(score_cutoff, "find_cutoff", lambda y, rate: 2_000.0)
    rows = {row["kind"]: row for row in score_clips("noise", [noise(), np.zeros(RATE), noise(seed=1)])}
    assert rows["original"]["clips"] == rows["original"]["false_alarms"] == 2, "zeros are left out"
    assert rows["original"]["treble_lost"] == 2 and rows["original"]["muffled"] == 0
    assert rows["low-pass 2000"]["within_half_octave"] == rows["low-pass 2000"]["answered"] == 2
    assert rows["low-pass 2000"]["median_octaves"] == rows["low-pass 2000"]["treble_lost"] == 0
    assert rows["low-pass 4000"]["median_octaves"] == -1 and rows["low-pass 4000"]["treble_lost"] == 2
    assert rows["mp3 64 at 44100"]["false_alarms"] == 2
    assert rows["all low-pass"]["answered"] == 10 and rows["all low-pass"]["within_half_octave"] == 2


def test_the_command_writes_a_row_for_each_source_and_kind(tmp_path):
    (tmp_path / "clips").mkdir()
    rows = ["file_name,caption,fold"]
    for i in range(4):
        write_wav(tmp_path / "clips" / f"{i}.wav", noise(seed=i))
        rows.append(f"{i}.wav,a hiss,{i % 2}")
    (tmp_path / "clips/metadata.csv").write_text("\n".join(rows) + "\n")
    done = in_process(score_cutoff, "--data", "clips", "--folds", 1, "--clips", 2, "--out", "out.json",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["kind"] for row in table] == 2 * [*KINDS, "all low-pass", "all mp3"]
    assert {row["source"] for row in table} == {"SoundWorld test", "clips folds 1"}
    own = [row for row in table if row["source"] != "SoundWorld test"]
    assert all(row["clips"] == 2 for row in own[: len(KINDS)])
    assert own[0]["false_alarms"] == 0 and own[-2]["within_half_octave"] == own[-2]["answered"] == 10
    assert done.stdout.count("\n") >= len(table)
    assert in_process(score_cutoff, "--folds", 1, "--out", "x.json", cwd=tmp_path).returncode == 2
