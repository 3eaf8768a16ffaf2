"""Claims about the report: one page, complete, that asks nobody and cannot be written into."""
import base64
import html.parser
import io
import json
import shutil
from pathlib import Path

import pytest
import scipy.io.wavfile
from conftest import in_process

from lab import report
from parts.audio import RATE
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

    assert page.count("audio") == 2 * 3 + 2 * 4 and page.count("script") == 0
    assert "<script>alert" in page.text and "& bell" in page.text and '<script>"t2a"' in page.text
    assert all(url.startswith("data:") for url in page.urls) and page.count("title") == 1
    wav = base64.b64decode(page.sources("audio")[0].split(",")[1])
    rate, x = scipy.io.wavfile.read(io.BytesIO(wav))
    assert rate == RATE and len(x) == 40_960
    for words in ("event set", "energy score", "codec ceiling", "muffled input", "Validation loss",
                  "Energy score on validation clips", "Regime r"):
        assert words in page.text
    assert page.differing >= {"t2a", "sr"} - {page.first_task}


@pytest.mark.parametrize("argv, message", [
    ((".", "--out", "x.txt"), "--out x.txt: must name an .html file"),
    ((".",), "not a run folder"),
])
def test_bad_input_ends_with_status_2_and_one_line(tmp_path, argv, message):
    done = in_process(report, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
