"""Claims about the page of a run: complete, silent towards the network, and not to be written into."""
import base64
import dataclasses
import html.parser
import io
import json
import re
import types

import numpy as np
import pytest
import soundfile
from browser import browser
from conftest import ROOT, in_process
from PIL import Image

import evaluate
import sampler
from parts.audio import RATE
from parts.config import resolve
from parts.errors import UserError
from parts.moments import read_moments, write_moment
from parts.page import write_page

STEPS = (16, 32, 64, 100)
HOSTILE = '</script><script>alert(1)</script> & "bell"'


class Validation:
    """Four clips whose captions are markup."""

    def __len__(self):
        return 4

    def caption(self, i):
        return f"{HOSTILE} {i}"

    def wave(self, i):
        return np.sin(440 * (i + 1) * np.arange(RATE) / RATE * 2 * np.pi).astype(np.float32) / 2


class Page(html.parser.HTMLParser):
    """What a browser would find in a page: tags, each with its attributes, and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.html = [], "", path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.text += text

    def all(self, tag, **having):
        return [attrs for name, attrs in self.tags if name == tag
                and all(attrs.get(key) == value for key, value in having.items())]


def write_run(folder, task="t2a", **given):
    """A run folder of 100 steps as training would leave it, with moments."""
    config = dataclasses.asdict(resolve({"task": task, "device": "cpu", "steps": 100, "seconds": 1.0,
                                         "data": "soundworld", "out": str(folder), **given}))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(10, 101, 10):
        r = step / 100
        rows.append({"step": step, "loss": 1.0, "loss_fm": 2 / step, "r": r, "lambda": 0.5 * (1 - r),
                     "mu": 0.0, "density": {"m": 2 - r, "s": 1.0, "u": 0.1}})
    rows += [{**rows[step // 10 - 1], "step": step, "D": 1 / step} for step in (32, 64)]
    rows.append({"step": 64, "eval": {"val_loss": 1.0, "val_loss_t": [1.0], "energy_score": 0.5,
                                      "lsd_hf": 0.9, "seconds": 9.0, "texture_score": 0.4,
                                      "event_accuracy": 0.5}})
    rows.sort(key=lambda row: row["step"])
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def noise(inputs, seeds):
        return np.stack([np.random.default_rng(seed).uniform(-0.1, 0.1, RATE) for seed in seeds])
    for step in STEPS:
        write_moment(types.SimpleNamespace(path=folder, config=config), step, Validation(), noise)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("page") / '<b>"run"', lr=1e-3)
    write_page(path, sampler.LogitNormal)
    return path


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "index.html")


def test_the_page_that_is_shipped_is_of_a_finished_default_run_and_small_enough_to_clone():
    path = ROOT / "docs/training.html"
    shipped = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= 3_000_000
    assert "6,000 of 6,000 steps" in shipped and "r lies inside at" in shipped
    settings = shipped.split("Settings that differ from the default")[1]
    assert "None: this is the default run." in settings


def test_a_page_asks_nobody_for_anything(page):
    """No address in it but data: URLs. Negative control: the search finds one."""
    address = re.compile(r"(?:https?:)?//[\w-]+\.|url\(|@import")
    assert not address.search(re.sub(r"base64,[\w+/=]+", "", page.html))
    assert address.search('<img src="https://example.com/x.png">')
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert len(links) > 30 and all(link.startswith("data:") for link in links)


def test_every_moment_has_its_sound_and_its_spectrogram(page, folder):
    """Those of the run folder, as far as a byte a sample can tell; each is shown at one position."""
    moments = read_moments(folder, 100)
    figures = [attrs for tag, attrs in page.tags if tag == "figure" and "data-from" in attrs]
    sounds, pictures = page.all("audio"), [attrs for attrs in page.all("img")]
    assert len(sounds) == len(pictures) == len(figures) == 4 * (len(STEPS) + 1)
    for sound, picture, figure in zip(sounds, pictures, figures):
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["src"].split(",")[1])))
        assert rate == RATE and len(wave) == RATE
        assert Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1]))).size[1] == 96
        title = sound["aria-label"].partition(":")[0]               # then its caption
        shown = (int(figure["data-from"]), int(figure["data-until"]))
        if title == "real clip":
            assert shown == (0, 3) and "hidden" not in figure
        else:
            k = STEPS.index(int(title.split()[-1]))
            assert shown == (k, k) and ("hidden" in figure) == (k < 3)
            error = min(np.abs(wave - made).max() for made in moments.made[STEPS[k]])
            assert error < 0.01


def test_the_slider_has_a_position_a_moment_and_the_cursor_a_place_for_each(page):
    slider, = page.all("input", type="range")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")
    x = [float(place) for place in slider["data-x"].split()]
    assert len(x) == 4 and x == sorted(x) and len(slider["data-labels"].split("|")) == 4
    cursors = page.all("path", **{"class": "cursor"})
    assert len(cursors) >= 7 and all(f"translate({x[-1]} 0)" == cursor["transform"] for cursor in cursors)
    rows = [attrs for attrs in page.all("tr") if "data-moment" in attrs]
    assert [row["data-moment"] for row in rows] == ["0", "1", "2", "3"]


def test_curves_hold_every_logged_step_and_phases_are_named(page):
    points = [int(attrs["data-points"]) for attrs in page.all("path") if "data-points" in attrs]
    assert points.count(12) == 5 and points.count(2) == 1, "loss, r, lambda, m, mu; D"
    assert "step 60: refines detail (r = 0.60)" in page.text
    assert "from the start: acquires semantics" in page.text
    readouts = [attrs for attrs in page.all("p") if attrs.get("class") == "readout"]
    assert len(readouts) == 4
    line = "step 32 of 100 · regime r 0.30, acquires semantics · discrepancy D 0.03"
    assert line in page.text


def test_captions_and_names_from_elsewhere_stay_text(page):
    """Negative control: they are there, word for word."""
    assert len(page.all("script")) == 1 and not page.all("b", id="run")
    assert page.text.count(f"{HOSTILE} 2") == 1 and '<b>"run"' in page.text
    assert "alert(1)" not in re.sub(r"&lt;/script&gt;.*", "", page.html)


def test_the_cost_the_settings_and_the_missing_table_are_said(page):
    assert re.search(r"sounds of 4 moments took [\d.]+ s, [\d.]+ % of 9 s of training", page.text)
    cells = re.findall(r"lr\s*0\.001\s*0\.002", page.text)
    assert cells and "None yet" in page.text and "not a default run" in page.text


def test_super_resolution_shows_input_output_and_truth(tmp_path):
    """In this order; a run without moments has a page too."""
    path = write_run(tmp_path / "sr", "sr")
    write_page(path, sampler.LogitNormal)
    names = [attrs["aria-label"] for attrs in Page(path / "index.html").all("audio")]
    titles = [name.removesuffix(f": {HOSTILE} 0") for name in names]
    assert titles[:6] == ["input, band-limited to 2 kHz", *(f"network, step {k}" for k in STEPS), "real clip"]
    for file in (path / "moments").glob("*"):
        file.unlink()
    write_page(path, sampler.LogitNormal)
    without = Page(path / "index.html")
    assert not without.all("audio") and without.all("input", type="range")[0]["max"] == "3"


def test_a_stopped_run_is_shown_up_to_its_last_step_with_the_last_sound_that_was_made(tmp_path):
    run = write_run(tmp_path / "run")
    for file in (run / "moments").glob("step*100*"):
        file.unlink()
    write_page(run, sampler.LogitNormal)
    page = Page(run / "index.html")
    assert page.all("input", type="range")[0]["data-labels"] == "step 16|step 32|step 64|step 100"
    (last,) = {attrs["data-until"] for attrs in page.all("figure", **{"data-from": "2"})}
    assert last == "3" and not page.all("figure", **{"data-from": "3"}) and "network, step 64" in page.html


def test_r_is_not_shown_where_nothing_measured_it(tmp_path):
    """It is 0 in the log then. Negative control: the run in which D was measured."""
    run = write_run(tmp_path / "run", recipe="static")
    write_page(run, sampler.LogitNormal)
    assert "regime r 0.30" in Page(run / "index.html").text
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("D", None)
        row.update({"r": 0.0} if "r" in row else {})
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(run, sampler.LogitNormal)
    text = Page(run / "index.html").text
    assert "· regime r" not in text and "Not measured in this run: Discrepancy D, Regime r." in text


def test_training_writes_the_page_and_the_command_writes_it_again(t2a_run, sr_run, tmp_path):
    for run, words in ((t2a_run, ("set of events right", "codec ceiling")), (sr_run, ("SI-SDR", "ridge"))):
        page = Page(run / "index.html")
        assert all(word in page.text for word in words) and "None yet" not in page.text
        assert len(page.all("audio")) >= 8
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "log.jsonl"):
        (copy / name).write_bytes((t2a_run / name).read_bytes())
    assert in_process(evaluate, "page", copy, cwd=tmp_path).returncode == 0
    assert (copy / "index.html").is_file()


@pytest.mark.parametrize("logged", [0, 10])
def test_a_run_that_ended_before_its_first_whole_moment_has_a_page_without_sounds(tmp_path, logged):
    run = write_run(tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[: logged // 10]))
    write_page(run, sampler.LogitNormal)
    page = Page(run / "index.html")
    assert not page.all("audio") and f"{logged} of 100 steps" in page.html


def test_a_folder_without_a_log_is_refused(tmp_path, t2a_run):
    (tmp_path / "config.json").write_bytes((t2a_run / "config.json").read_bytes())
    with pytest.raises(UserError, match="no log.jsonl"):
        write_page(tmp_path, sampler.LogitNormal)
    assert not (tmp_path / "index.html").exists()


ARROW_LEFT = "\ue012"
STATE = """const shown = [...document.querySelectorAll(".slot audio")].filter((a) => !a.closest("[hidden]"));
return [document.getElementById("moment").getAttribute("aria-valuetext"), shown.length,
        shown[0].getAttribute("aria-label").split(":")[0], document.querySelector("tr.now th").textContent,
        document.querySelector(".cursor").getAttribute("transform"),
        document.documentElement.scrollWidth - document.documentElement.clientWidth]"""
LOAD = """const done = arguments[arguments.length - 1];
const shown = [...document.querySelectorAll(".slot audio")].filter((a) => !a.closest("[hidden]"));
Promise.all(shown.map((a) => new Promise((over) => {
  a.oncanplaythrough = () => over(a.duration);
  a.onerror = () => over(a.error.message);
  a.load();
}))).then(done)"""
IN_TURN = """const done = arguments[arguments.length - 1];
const button = document.querySelector("button[data-slot]");
const heard = new Set();
for (const audio of document.querySelectorAll(".slot audio")) {
  audio.playbackRate = audio.defaultPlaybackRate = 8;
  audio.addEventListener("playing", () => heard.add(audio.getAttribute("aria-label").split(":")[0]));
}
button.click();
const wait = setInterval(() => {
  if (button.textContent !== "stop") { clearInterval(wait); done([...heard]); }
}, 50)"""


def test_in_a_browser_the_slider_moves_sounds_load_and_nothing_is_complained_about(folder):
    """Arrow keys move it; at 390, 1,024 and 1,600 pixels nothing sticks out; a clip plays at all moments in
    turn."""
    with browser() as chromium:
        if chromium is None:
            pytest.skip("no Chromium with its driver here")
        for width in (390, 1_024, 1_600):
            chromium.open(folder / "index.html", width)
            last = chromium.run(STATE)
            assert last[0] == "step 100" and last[1] == 8 and last[2] == "network, step 100" and last[5] <= 0
        chromium.press("#moment", ARROW_LEFT)
        before = chromium.run(STATE)
        assert before[:4] == ["step 64", 8, "network, step 64", "64"] and before[4] != last[4]
        assert all(abs(seconds - 1) < 0.01 for seconds in chromium.wait(LOAD))
        assert chromium.wait(IN_TURN) == [f"network, step {step}" for step in STEPS]
        assert chromium.console() == []
        chromium.run("console.error('negative control')")
        assert len(chromium.console()) == 1
