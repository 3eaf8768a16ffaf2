"""index.html of a run folder: the run as a page on which training time is a slider.

At each moment (parts/moments.py) one hears what the network makes of the same captions and noise, and sees
where training is: losses, D, r and what r drives, both axes of quality, the density of timesteps, the
similarity of the blocks. Below: the run over the band of default runs, the final scores, the settings.

One file that asks no server for anything: sounds, pictures and curves are in it. It is made from the files of
the run folder alone, so it can be written again at any time, except the density of training timesteps, which
the caller hands in. Captions and names may come from somebody else's folder: the templates
(parts/templates/) escape every text. What a slider position shows is in the page from the start, marked with
the positions at which it is shown, so the script (slider.js) only hides and shows.

Public: draw_pages, write_page, environment, slider_of, clips_of, and texts: HOW_TO, REFERENCES,
SPECTROGRAM_NOTE, TASKS.
"""
from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from parts.audio import mu_law_wav
from parts.config import Config, load_config, settings_not_default
from parts.curves import StepAxis
from parts.dashboard import draw_dashboard, why_no_similarity
from parts.files import reading, write_text
from parts.moments import FIRST, MOMENT_STEPS, Moments, read_moments
from parts.page_figures import (
    AXES,
    BOX,
    compare_with_band,
    densities,
    last_value,
    panels_of,
    r_is_used,
    similarity_at,
    spans,
)
from parts.progress import REFINES, Phases
from parts.runs import read_log, read_scores
from parts.scoring import protocol_line
from parts.spectrograms import spectrogram_png

TASKS = {"t2a": "captions to sound", "sr": "band-limited to full-band sound"}
REFERENCES = {"input": "input, band-limited to 2 kHz", "real": "real clip"}
SPECTROGRAM_NOTE = (f"Sounds of the network are made in {MOMENT_STEPS} integration steps, to be quick "
                    "(previews: 12; the final scores: {sample_steps}). Spectrograms: time from left to right "
                    "({seconds:g} s), frequency from bottom to top (0 to 8 kHz), level from black (-80 dB re "
                    "full scale) to bright (0 dB).")
HOW_TO = ("Move the slider (or use the arrow keys on it): each position is a moment of training, and all "
          "that is shown is of that moment. The network (the average of its weights over the last steps) is "
          "always given the same {what} and the same noise, so all that changes is what it has learnt. The "
          "regime r says where training is: near 0 it still acquires which sounds there are, near 1 it only "
          "refines them.")


# --- the page -----------------------------------------------------------------------------------------------

def draw_pages(path: Path, logit_normal) -> None:
    """Draw dashboard.png and index.html of a run folder."""
    draw_dashboard(path, logit_normal)
    write_page(path, logit_normal)


def write_page(path: Path, logit_normal) -> None:
    """Write index.html of a run folder. UserError where there is no log.

    logit_normal(m, s, u): the density of training timesteps with a method pdf(t)."""
    config, rows = load_config(path), read_log(path)
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval" in row]
    done = max([row["step"] for row in rows], default=0)
    last = max(1, done)
    moments = read_moments(path, last)
    steps = sorted({*moments.made, last}) if moments.made else doublings(last)
    axis = StepAxis(last)
    phases = phases_of(config, train)
    states = [state_at(step, train, evals, phases, config) for step in steps]
    band, normal = compare_with_band(config, train)
    panels, missing = panels_of(config, train, evals, axis, band)
    name = "/".join(path.resolve().parts[-2:])
    html = environment().get_template("run.html.j2").render(
        name=name,
        what=f"{TASKS[config['task']]} on {config['data']}, recipe {config['recipe']}, {done:,} of "
             f"{config['steps']:,} steps, seed {config['seed']}.",
        how_to=HOW_TO.format(what="captions" if config["task"] == "t2a" else "band-limited clips"),
        slider=slider_of(steps, axis, [readout(state, config) for state in states]),
        clips=clips_of([("network", moments)], steps) if moments.made else [],
        spectrogram_note=SPECTROGRAM_NOTE.format(**config),
        cost=cost_of(moments, evals),
        phases=[phase_line(step, text, r, train[0]["step"]) for step, text, r in phases],
        marks=[(axis.x(step), chr(ord("A") + k)) for k, (step, _, _) in enumerate(phases)
               if step > train[0]["step"]],
        refines=REFINES,
        panels=panels, missing=missing, band_note="a further default run, 95 %",
        box=BOX,
        density=densities(steps, train, logit_normal),
        similarity=spans([similarity_at(step, train) for step in steps], skip_none=True),
        no_similarity=why_no_similarity(config),
        normal=normal,
        table=moment_table(states, config),
        scores=score_table(path, config["task"]),
        settings=settings_not_default(config),
    )
    write_text(path / "index.html", html)


def environment() -> jinja2.Environment:
    """Templates in which every text is escaped."""
    folder = Path(__file__).parent / "templates"
    return jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def doublings(last: int) -> list[int]:
    """Steps of the slider where there are no sounds."""
    return [step for step in (FIRST * 2**k for k in range(27)) if step < last] + [last]


# --- what is shown at which position of the slider ----------------------------------------------------------

def slider_of(steps: list[int], axis: StepAxis, readouts: list[str]) -> dict:
    """The slider: its steps, where the cursor of curves stands at each, and what is said there."""
    return {"steps": steps, "x": [axis.x(max(step, axis.first)) for step in steps], "readouts": readouts,
            "labels": [f"step {step:,}" for step in steps]}


@dataclass
class Sound:
    """A spectrogram and its sound, as data: URLs, shown from position `first` to `until`."""
    title: str
    picture: str
    wav: str
    first: int
    until: int


def make_sound(title: str, wave: np.ndarray, first: int, until: int) -> Sound:
    picture = "data:image/png;base64," + base64.b64encode(spectrogram_png(wave)).decode()
    wav = "data:audio/wav;base64," + base64.b64encode(mu_law_wav(wave)).decode()
    return Sound(title, picture, wav, first, until)


def clips_of(runs: list[tuple[str, Moments]], steps: list[int]) -> list[dict]:
    """Each clip of runs (name, moments) that were given the same: its caption, and slots that stand beside
    each other, those of the runs between the input (super-resolution) and the real clip. The sounds of a slot
    can be played in turn; each is shown from its step until the next one's."""
    clips, last, shared = [], len(steps) - 1, runs[0][1]
    for k, caption in enumerate(shared.captions):
        slots = [_sounds_of(name, moments, k, steps) for name, moments in runs]
        around = {name: [make_sound(REFERENCES[name], waves[k], 0, last)]
                  for name, waves in shared.references.items()}
        slots = [around[name] for name in ("input",) if name in around] + [*slots, around["real"]]
        clips.append({"caption": caption,
                      "slots": [{"index": j, "sounds": sounds} for j, sounds in enumerate(slots)]})
    return clips


def _sounds_of(name: str, moments: Moments, k: int, steps: list[int]) -> list[Sound]:
    """What a run made of the k-th clip, at each of its moments."""
    own = [steps.index(step) for step in moments.made]
    ends = [position - 1 for position in own[1:]] + [len(steps) - 1]
    return [make_sound(f"{name}, step {step:,}", waves[k], position, until)
            for (step, waves), position, until in zip(moments.made.items(), own, ends)]


def cost_of(moments: Moments, evals: list[dict]) -> str:
    """What the moments cost, in words."""
    trained = [row["eval"]["seconds"] for row in evals if "seconds" in row["eval"]]
    if not moments.made or not trained:
        return ""
    n = len(moments.made)
    return (f"Making the sounds of {n} moment{'s' * (n > 1)} took {moments.seconds:.1f} s, "
            f"{100 * moments.seconds / max(trained[-1], 1e-9):.1f} % of {trained[-1]:,.0f} s of training "
            "without its evaluations.")


# --- where training was -------------------------------------------------------------------------------------

def phases_of(config: dict, train: list[dict]) -> list[tuple[int, str, float]]:
    """(step, what is reached, r) of each change of phase, at the first logged step that shows it."""
    phases, found = Phases(Config(**config)), []
    for row in train:
        new = phases.reached(row["r"], row["lambda"], row["mu"])
        found += [(row["step"], text, row["r"]) for text in new]
    return found


def phase_line(step: int, text: str, r: float, first: int) -> str:
    return f"{'from the start' if step == first else f'step {step:,}'}: {text} (r = {r:.2f})"


def state_at(step: int, train: list[dict], evals: list[dict], phases: list[tuple], config: dict) -> dict:
    """What was last logged up to a step; the loss is a mean of up to five logged steps."""
    reached = [text for at, text, _ in phases if at <= step]
    losses = [row["loss_fm"] for row in train if row["step"] <= step and row["loss_fm"] is not None][-5:]
    before = [row for row in evals if row["step"] <= step]
    measured = before[-1]["eval"] if before else {}
    density = last_value(train, step, "density") or {}
    state = {"step": step, "phase": phase_name(reached), "loss": np.mean(losses) if losses else None,
             "m": density.get("m")}
    for name in ("D", "lambda", "mu"):
        state[name] = last_value(train, step, name)
    state["r"] = last_value(train, step, "r") if r_is_used(train) else None
    for key, _, _ in AXES[config["task"]]:
        state[key] = measured.get(key)
    return state


def phase_name(reached: list[str]) -> str:
    """The phase that was reached last, and what has changed besides."""
    phase = "".join([text for text in reached if text in ("acquires semantics", "refines detail")][-1:])
    parts = [phase] if phase else []
    if "guidance ends" in reached:
        parts.append("guidance has ended")
    if any("structure loss" in text for text in reached):
        parts.append("structure loss is on")
    return ", ".join(parts)


def number(value, digits: int = 2) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def readout(state: dict, config: dict) -> str:
    """One line about a moment."""
    shown = [f"step {state['step']:,} of {config['steps']:,}"]
    if state["r"] is not None:
        shown.append(f"regime r {number(state['r'])}" + f", {state['phase']}" * bool(state["phase"]))
    if state["D"] is not None:
        shown.append(f"discrepancy D {number(state['D'])}")
    return " · ".join(shown)


def moment_table(states: list[dict], config: dict) -> dict:
    axes = [axis for axis in AXES[config["task"]] if any(state[axis[0]] is not None for state in states)]
    headings = ["step", "phase", "loss", "D", "r", "lambda", "m", "mu"]
    headings += [title.partition(": ")[2] for _, title, _ in axes]
    keys = ["loss", "D", "r", "lambda", "m", "mu", *(key for key, _, _ in axes)]
    rows = []
    for state in states:
        values = [number(state[key], 3) for key in keys]
        rows.append([f"{state['step']:,}", state["phase"] or "-", *values])
    return {"headings": headings, "rows": rows}


# --- tables -------------------------------------------------------------------------------------------------

def score_table(path: Path, task: str) -> dict | None:
    """The final table of a run (scores.json); None before there is one."""
    score = read_scores(path)
    if score is None:
        return None
    with reading(path / "scores.json", f"score the run again: python evaluate.py score {path}"):
        return _table_of(score, task)


def _table_of(score: dict, task: str) -> dict:
    rows = list(score["rows"].values())
    if task == "sr":
        columns = {"energy score": "energy_score", "LSD": "lsd", "LSD-LF": "lsd_lf", "LSD-HF": "lsd_hf",
                   "SI-SDR, dB": "si_sdr"}
        headings, cells = list(columns), []
        for row in rows:
            cells.append([with_interval(row[key]["mean"], row[key]["interval"]) for key in columns.values()])
    elif "exact" in rows[0]:
        sizes = sorted({int(k) for row in rows for k in row["by_events"]})
        of_sizes = [f"{k} event{'s' if k > 1 else ''}" for k in sizes]
        headings = ["set of events right", *of_sizes, "order right", "1000 KID"]
        cells = [_caption_cells(row, sizes) for row in rows]
    else:
        headings, cells = ["KID"], [[number(row["kid"], 4)] for row in rows]
    protocol = protocol_line({name: value for name, value in score["protocol"].items() if name != "run"})
    table = [[row["row"], *values] for row, values in zip(rows, cells)]
    return {"headings": ["", *headings], "rows": table,
            "protocol": f"Intervals: 95 % over clips. {protocol}."}


def with_interval(value, ends) -> str:
    return f"{number(value, 3)} [{number(ends[0], 3)}, {number(ends[1], 3)}]"


def _caption_cells(row: dict, sizes: list[int]) -> list[str]:
    by_size = {int(k): of["exact"] for k, of in row["by_events"].items()}
    kid = None if row["kid"] is None else 1e3 * row["kid"]
    return [with_interval(row["exact"], row["interval"]), *(number(by_size.get(k), 3) for k in sizes),
            number(row["order"], 3), number(kid, 2)]
