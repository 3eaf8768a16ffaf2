"""Several runs side by side: one HTML file to read and to play sounds from.

    python -m lab.report runs/a runs/b --out report.html

Comes in: run folders. Goes out: one page with a table of results; one slider over training time, with what
each run made of the same clips at that step (parts/moments.py); learning curves; sounds of unseen clips made
from the same noise at the end; the settings that differ; and the runs' dashboards. Pictures and sounds are in
the page itself: it can be sent to somebody, and asks no server for anything. Names, captions and settings may
come from somebody else's folder, so the template escapes every text it is given (jinja2's autoescape).

Runs of one task, data and clip length share the sounds they are compared on. A run that lacks a part (log,
final table, dashboard) is shown without it. Errors are UserErrors.

Public: report, render.
"""
from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
from lab.statistics import format_interval
from parts.arguments import Parser, new_file, whole
from parts.audio import first_seconds, write_wav
from parts.band_limit import CUTOFF, band_limit
from parts.curves import Series, StepAxis, make_panel
from parts.errors import UserError, run_cli
from parts.files import write_text
from parts.moments import read_moments
from parts.page import (
    HOW_TO,
    REFERENCES,
    SPECTROGRAM_NOTE,
    TASKS,
    clips_of,
    environment,
    slider_of,
)
from parts.page_figures import BOX, r_is_used
from parts.runs import read_log, read_scores
from parts.scoring import protocol_line
from parts.spectrograms import draw_spectrogram

CURVES = (      # (title, key in an evaluation of the log, axis)
    ("Validation loss", "val_loss", "squared velocity error"),
    ("Event sets right on validation clips", "event_accuracy", "share"),
    ("Energy score of texture on validation clips", "texture_score", "energy score"),
    ("LSD above 2 kHz on validation clips", "lsd_hf", "decades"),
    ("Energy score on validation clips", "energy_score", "energy score"),
)
KIND = ("task", "data", "seconds", "val_fold", "codec", "channels")  # what runs share that share clips
NOT_COMPARED = ("out", "workers", "profile")  # settings that may differ between two runs of the same kind

PAGE = """\
{% import "curves.html.j2" as drawn %}
{% import "moments.html.j2" as moments %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<title>Report: {{ names | join(", ") }}</title>
<style>
{% include "style.css" %}
img{max-width:100%;height:auto}
.grid-of-runs th,.grid-of-runs td{min-width:8rem;max-width:24rem}
td.differs{background:#fff3c4;font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr))}
.cards{gap:1rem;margin:.5rem 0 1.5rem}
.cards figure{margin:0;min-width:0;border:1px solid #ddd;border-radius:6px;padding:.5rem}
audio{width:100%}
blockquote{margin:.8rem 0 .2rem;font-weight:600}
</style>
{{ moments.without_script() }}
</head><body>

{% macro grid(rows) %}
<div class=wide><table class=grid-of-runs>
<tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for title, cells in rows %}
<tr><th>{{ title }}</th>{% for text, differs in cells %}
<td{% if differs %} class=differs{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}

<h1>Report of {{ names | length }} run{{ "s" if names | length > 1 }}</h1>
<h2>Results</h2>
{{ grid(results) }}

{% if slider %}
<h2>Hear training happen</h2>
<p>{{ how_to }}</p>
{{ moments.bar(slider) }}
{% for title, clips in training %}
{% set kind = loop.index %}
<h3>{{ title }}</h3>
{{ moments.clips(clips, slider.steps | length - 1, "clip" ~ kind ~ "-") }}
{% endfor %}
<p class=note>{{ spectrogram_note }}</p>
{% endif %}

<h2>Learning curves</h2>
<div class=panels>
{% for panel in curves %}
{{ drawn.panel(panel, box, slider.x[-1] if slider else none, []) }}
{% endfor %}
</div>

{% for task, data, clips in sounds %}
<h2>Sounds at the end: {{ task }} on {{ data }}</h2>
<p class=note>Unseen clips; the same noise for every run.</p>
{% for caption, cards in clips %}
<blockquote>{{ caption }}</blockquote>
<div class=cards>
{% for title, picture, sound in cards %}
<figure><figcaption>{{ title }}</figcaption>
<img alt="spectrogram, {{ title }}: {{ caption }}" src="{{ picture }}">
<audio controls preload="metadata" aria-label="{{ title }}: {{ caption }}" src="{{ sound }}"></audio></figure>
{% endfor %}
</div>
{% endfor %}
{% endfor %}

<h2>Settings that differ</h2>
{% if settings %}{{ grid(settings) }}{% else %}<p>None.</p>{% endif %}

<h2>Dashboards</h2>
{% for name, picture in dashboards %}
<details><summary>{{ name }}</summary><img alt="dashboard of {{ name }}" src="{{ picture }}"></details>
{% else %}
<p>None.</p>
{% endfor %}
{% if slider %}
<script>
{% include "slider.js" %}
</script>
{% endif %}
</body></html>
"""


def report(paths: list[Path], out: Path, clips: int = 4) -> None:
    """Write one self-contained HTML file about runs: results, curves, sounds, settings that differ,
    dashboards. clips: how many unseen clips of each task; with 0 the data that they come from need not be
    there. UserError: not an .html file, not a run folder."""
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"--out {out}: must name an .html file")
    runs = [evaluate.load_run(path) for path in paths]
    html = render(runs, _names(paths), clips)
    write_text(out, html)
    print(f"{out}: {len(html) / 1e6:.1f} MB, {len(runs)} run{'s' if len(runs) > 1 else ''}")


def render(runs: list, names: list[str], clips: int) -> str:
    """The page about loaded runs, as they are to be called in it."""
    logs = [_log(run) for run in runs]
    axis = StepAxis(max(run.step for run in runs))
    slider, training = _training(runs, names, axis)
    return environment().from_string(PAGE).render(
        names=names,
        results=_results(runs),
        slider=slider,
        training=training,
        how_to=HOW_TO.format(what="input"),
        spectrogram_note=SPECTROGRAM_NOTE.format(**runs[0].config),
        curves=_curves(logs, names, axis),
        box=BOX,
        sounds=_sounds(runs, names, clips) if clips else [],
        settings=_settings_that_differ(runs),
        dashboards=_dashboards(runs, names),
    )


def _names(paths: list[Path]) -> list[str]:
    """Paths without the folders that all of them share, which tell nothing apart."""
    shared = os.path.commonpath([path.resolve().parent for path in paths])
    return [os.path.relpath(path.resolve(), shared) for path in paths]


# --- results and settings: rows (title, [(text, is it to be marked?) of each run]) --------------------------

def _results(runs: list) -> list[tuple]:
    """What was trained, its result, its ceiling, the protocol."""
    titles = ("recipe", "task, data", "steps", "result, 95 % interval over clips",
              "ceiling: real clips through the codec", "protocol")
    columns = [_result_of(run) for run in runs]
    rows = []
    for title, *texts in zip(titles, *columns):
        rows.append((title, [(text, False) for text in texts]))
    return rows


def _result_of(run) -> tuple[str, ...]:
    score = read_scores(run.path) or {"rows": {}, "protocol": {}}
    table = score["rows"]
    protocol = {name: value for name, value in score["protocol"].items() if name not in ("run", "step")}
    return (run.config.get("recipe", "-"), f"{run.config['task']}, {run.config['data']}", str(run.step),
            _score_text(table.get("model")), _score_text(table.get("codec ceiling")),
            protocol_line(protocol) or "-")


def _score_text(row: dict | None) -> str:
    """A row of a final table, by the first metric that it has."""
    if row is None:
        return "no final table"
    if "exact" in row:
        return f"event set {row['exact']:.3f} {format_interval(row['interval'], False)}"
    if "energy_score" in row:
        score = row["energy_score"]
        return f"energy score {score['mean']:.3f} {format_interval(score['interval'], False)}"
    return "KID -, of too few clips" if row["kid"] is None else f"KID {row['kid']:.4f}"


def _settings_that_differ(runs: list) -> list[tuple]:
    """Settings that not all runs share; those are marked that are not the first run's."""
    fields = dict.fromkeys(field for run in runs for field in run.config)
    rows = []
    for field in fields:
        texts = [str(run.config.get(field, "-")) for run in runs]
        if field not in NOT_COMPARED and len(set(texts)) > 1:
            rows.append((field, [(text, text != texts[0]) for text in texts]))
    return rows


# --- training, on one slider --------------------------------------------------------------------------------

def _training(runs: list, names: list[str], axis: StepAxis) -> tuple[dict | None, list]:
    """The slider over the moments of all runs, and (title, clips) of each kind of run: runs of a kind were
    given the same clips. (None, []) where no run has moments."""
    kept = [read_moments(run.path, run.step) for run in runs]
    steps = sorted({step for moments in kept for step in moments.made})
    if not steps:
        return None, []
    kinds: dict[tuple, list] = {}
    for name, run, moments in zip(names, runs, kept):
        if moments.made:
            kind = (TASKS[run.config["task"]], run.config["data"], *moments.captions)
            kinds.setdefault(kind, []).append((name, moments))
    readouts = [f"step {step:,}; each run at its last moment up to this step" for step in steps]
    training = [(f"{task} on {folder}", clips_of(group, steps))
                for (task, folder, *_), group in kinds.items()]
    return slider_of(steps, axis, readouts), training


# --- pictures and sounds, as data: URLs ---------------------------------------------------------------------

def _curves(logs: list[list[dict]], names: list[str], axis: StepAxis) -> list:
    """Panels of validation loss, each quality measured, D and r, all runs overlaid; without those that no run
    has."""
    panels = []
    for title, metric, unit in CURVES:
        panels.append((title, unit, "points", [_evaluations(log, metric) for log in logs]))
    panels.append(("Discrepancy D", "1 - cosine", "points",
                   [[(row["step"], row["D"]) for row in log if "D" in row] for log in logs]))
    panels.append(("Regime r", "0 acquires, 1 refines", "steps", [_regime(log) for log in logs]))
    drawn = []
    for title, unit, how, points in panels:
        series = [Series(name, of_run, how, k) for k, (name, of_run) in enumerate(zip(names, points))]
        drawn.append(make_panel(title, unit, series, axis, (0, 1.02) if title == "Regime r" else None))
    return [panel for panel in drawn if panel]


def _log(run) -> list[dict]:
    return read_log(run.path) if (run.path / "log.jsonl").is_file() else []


def _evaluations(log: list[dict], metric: str) -> list[tuple]:
    """(step, value) where it was measured."""
    return [(row["step"], row["eval"][metric]) for row in log if row.get("eval", {}).get(metric) is not None]


def _regime(log: list[dict]) -> list[tuple]:
    """(step, r); nothing to see where r was never measured."""
    return [(row["step"], row["r"]) for row in log if "r" in row and r_is_used(log)]


def _dashboards(runs: list, names: list[str]) -> list[tuple[str, str]]:
    pictures = []
    for name, run in zip(names, runs):
        path = run.path / "dashboard.png"
        if path.is_file():
            pictures.append((name, _data_url("image/png", path.read_bytes())))
    return pictures


def _sounds(runs: list, names: list[str], n: int) -> list[tuple]:
    """(task, data, clips) of each kind of run, in the order in which they come; runs of a kind share their
    clips, of which none was trained on."""
    groups = {}
    for name, run in zip(names, runs):
        kind = tuple(run.config[name] for name in KIND)
        groups.setdefault(kind, []).append((name, run))
    return [(task, folder, _clips(group, n)) for (task, folder, *_), group in groups.items()]


def _clips(runs: list[tuple], n: int) -> list[tuple]:
    """n unseen clips as (caption, cards), for every (name, run) of a kind: real, codec ceiling, (muffled
    input,) each run from the same noise."""
    first = runs[0][1]
    test = data.open_set(first.config, "test", 64)
    rows = _spread_over_lengths(test, n)
    captions = [test.caption(i) for i in rows]
    seeds = list(range(len(rows)))
    real = np.stack([first_seconds(test.wave(i), first.config["seconds"]) for i in rows])      # (n, N)
    ceiling = first.codec.decode(first.codec.encode(torch.as_tensor(real))).numpy()
    columns = [("real", real), ("codec ceiling", ceiling)]
    if first.config["task"] == "sr":
        muffled = np.stack([band_limit(wave, CUTOFF) for wave in real])
        columns.append((REFERENCES["input"], muffled))
    for name, run in runs:
        if run.config["task"] == "t2a":
            made = evaluate.generate(run, captions, seeds)
        else:
            made = evaluate.upsample(run, muffled, CUTOFF, seeds)
        columns.append((f"{name}, step {run.step}", made[:, : real.shape[1]]))
    return [(caption, [_card(title, waves[k]) for title, waves in columns])
            for k, caption in enumerate(captions)]


def _spread_over_lengths(test, n: int) -> list[int]:
    """n of the first 64 clips, from the shortest caption to the longest."""
    size = min(64, len(test))
    by_length = sorted(range(size), key=lambda i: (len(test.caption(i)), i))
    return by_length[:: max(1, size // n)][:n]


def _card(title: str, wave: np.ndarray) -> tuple[str, str, str]:
    """(title, spectrogram, sound) of a wave (N,)."""
    ax = _axes(3.4, 2.2)
    draw_spectrogram(ax, wave, "")
    ax.set_xlabel("time (s)", fontsize=8)
    ax.set_ylabel("frequency (kHz)", fontsize=8)
    return title, _png(ax), _wav(wave)


def _axes(width: float, height: float):
    """The axes of a new picture, in inches; not by pyplot, which would keep it and may open a window."""
    from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained").subplots()


def _png(ax) -> str:
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", dpi=100)
    return _data_url("image/png", buffer.getvalue())


def _wav(wave: np.ndarray) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.wav"
        write_wav(path, wave)
        return _data_url("audio/wav", path.read_bytes())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


# --- command ------------------------------------------------------------------------------------------------

def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=new_file, default=Path("report.html"))
    parser.add_argument("--clips", type=whole(0), default=4, help="0: the runs' data need not be there")
    args = parser.parse_args()
    report(args.runs, args.out, args.clips)


if __name__ == "__main__":
    run_cli(main)
