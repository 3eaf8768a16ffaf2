"""Claims about the report: one page, complete, that asks nobody and cannot be written into."""
import base64
import html.parser
import io
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
from conftest import in_process

from lab import report
from parts.audio import RATE
from parts.curves import StepAxis
from parts.moments import write_moment
from parts.soundworld import SoundWorld


class Page(html.parser.HTMLParser):
    """A report made of runs, and what a browser would find in it."""

    def __init__(self, path, *runs):
        super().__init__()
        self.tags = []
        self.text = ""
        self.urls = []
        self.differing = set()  # texts of marked cells
        self.inside_marked = False
        self.first_task = json.loads((runs[0] / "config.json").read_text())["task"]
        report.report([Path(run) for run in runs], path, clips=2)
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.urls += [value for name, value in attrs if name in ("src", "href")]
        self.inside_marked = ("class", "differs") in attrs

    def handle_data(self, text):
        self.text += text
        if self.inside_marked:
            self.differing.add(text)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def sources(self, tag):
        return [attrs["src"] for name, attrs in self.tags if name == tag]


def test_a_report_is_one_page_that_asks_nobody_and_cannot_be_written_into(t2a_run, sr_run, tmp_path,
                                                                          monkeypatch):
    """Results, curves, sounds of both tasks, differing settings; a caption or a name that is markup stays
    text."""
    monkeypatch.setattr(SoundWorld, "caption", lambda self, i, k=0: f"<script>alert({i})</script> & bell")
    moved = shutil.copytree(t2a_run, tmp_path / '<script>"t2a"')
    # Twelve steps hold no probe: give it a regime to draw.
    with open(moved / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 12, "r": 0.5}) + "\n")
    page = Page(tmp_path / "r.html", moved, sr_run)

    # At the end two clips of each task; on the slider all four, each beside its references.
    assert page.count("audio") == 2 * 3 + 2 * 4 + 4 * 2 + 4 * 3 and page.count("script") == 1
    assert page.count("input") == 1 and "captions to sound on soundworld" in page.text
    assert "<script>alert" in page.text and "& bell" in page.text and '<script>"t2a"' in page.text
    assert all(url.startswith("data:") for url in page.urls) and page.count("title") == 1
    wav = base64.b64decode(page.sources("audio")[-1].split(",")[1])
    rate, x = scipy.io.wavfile.read(io.BytesIO(wav))
    assert rate == RATE and len(x) == 40_960
    for words in ("event set", "energy score", "codec ceiling", "input, band-limited to 2 kHz",
                  "Validation loss", "Energy score on validation clips", "Regime r", "Hear training happen"):
        assert words in page.text
    assert page.differing >= {"t2a", "sr"} - {page.first_task}


def test_a_report_without_sounds_at_the_end_needs_no_data(t2a_run, tmp_path):
    moved = shutil.copytree(t2a_run, tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    done = in_process(report, str(moved), "--out", "asked.html", cwd=tmp_path)
    assert done.returncode == 2 and "gone" in done.stderr and not (tmp_path / "asked.html").exists()

    done = in_process(report, str(moved), "--out", "r.html", "--clips", "0", cwd=tmp_path)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "Hear training happen" in page and "Sounds at the end" not in page


def moments(path, *steps) -> types.SimpleNamespace:
    """A run of which moments were written at some steps, all of the same clips."""
    run = types.SimpleNamespace(path=path, step=steps[-1],
                                config={"task": "t2a", "data": "soundworld", "seconds": 1.0})
    for step in steps:
        write_moment(run, step, SoundWorld("val", 4), lambda inputs, seeds: np.zeros((4, RATE)))
    return run


def test_on_one_slider_each_run_is_heard_at_its_last_moment(tmp_path):
    """Two runs of different lengths: steps of both; before its first moment a run is silent. Without moments
    there is no slider."""
    runs = [moments(tmp_path / "a", 16, 32, 64), moments(tmp_path / "b", 32, 50)]
    slider, ((title, clips),) = report._training(runs, ["a", "b"], StepAxis(64))
    assert slider["steps"] == [16, 32, 50, 64] and len(clips) == 4 and title.endswith("on soundworld")
    a, b, real = ([(sound.title, sound.first, sound.until) for sound in slot["sounds"]]
                  for slot in clips[0]["slots"])
    assert real == [("real clip", 0, 3)]
    assert a == [("a, step 16", 0, 0), ("a, step 32", 1, 2), ("a, step 64", 3, 3)]
    assert b == [("b, step 32", 1, 1), ("b, step 50", 2, 3)]
    none = types.SimpleNamespace(path=tmp_path, step=9, config=runs[0].config)
    assert report._training([none], ["c"], StepAxis(9)) == (None, [])


def test_a_distance_of_too_few_clips_is_no_number_and_runs_of_other_folds_share_no_clips(monkeypatch):
    assert report._score_text({"row": "model", "kid": None}) == "KID -, of too few clips"
    assert report._score_text({"row": "model", "kid": 0.25}) == "KID 0.2500"
    monkeypatch.setattr(report, "_clips", lambda group, n: [name for name, _ in group])
    config = {"task": "t2a", "data": "a", "seconds": 1.0, "codec": "mel", "channels": 64}
    runs = [types.SimpleNamespace(config={**config, "val_fold": fold}) for fold in (1, 2, 1)]
    assert report._sounds(runs, ["x", "y", "z"], 4) == [("t2a", "a", ["x", "z"]), ("t2a", "a", ["y"])]


@pytest.mark.parametrize("argv, message", [
    ((".", "--out", "x.txt"), "--out x.txt: must name an .html file"),
    ((".",), "not a run folder"),
])
def test_bad_input_ends_with_status_2_and_one_line(tmp_path, argv, message):
    done = in_process(report, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
