"""The tables of results in README.md and docs/results.md, written from the files in results/.

    python -m lab.result_tables          # writes them anew, each between its marks
    python -m lab.result_tables --check  # exit status 1 where a page says something else than the files do

A page marks the place of a table: `<!-- table: NAME -->` before it, `<!-- end -->` after it; NAME is one of
TABLES. An experiment's summary.json is made of its rows by `python -m lab.experiments table FOLDER`.

Public: TABLES, PAGES, filled, main.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from lab.statistics import format_interval, format_ratio
from lab.tables import secondary_metrics, summarize
from parts.arguments import Parser
from parts.errors import UserError, run_cli
from parts.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = ("README.md", "docs/results.md")
CAPTIONS = "captions: event set right"
RESTORED = "super-resolution: energy score, lower is better"
COMPARED = {  # what is compared -> folder of results/
    "event sets, text-to-audio": "e1-full", "energy score (lower is better), super-resolution": "e1-sr-full"}
FIRST = {CAPTIONS: "e1", RESTORED: "e1-sr", "the same on ESC-10, fold 5 held out": "e1-esc10"}
FULL, FULL_SR = "e1-full", "e1-sr-full"  # both tasks at full length
ANSWERS = {  # question -> (arm, the arm that it is compared with), at full length
    "Do stages pay?": ("stage", "static"),
    "Does measuring r pay, against r = k/K?": ("stage", "clock"),
    "Does it matter when r rises? (its values in random order)": ("stage", "permuted"),
    "Does a clock pay?": ("clock", "static"),
    "Does it matter that guidance ends at 0.4 K?": ("stop", "static"),
    "Do constant guidance and noisier timesteps pay?": ("static", "vanilla"),
    "The timesteps alone?": ("density alone", "vanilla"),
    "Guidance besides?": ("static", "density alone"),
}
SCREEN, ON_THE_WAY = "e1-sr-dev", (512, 1_024, 2_048, 3_000)


def _text(name: str) -> str:
    path = RESULTS / name
    if not path.is_file():
        raise UserError(f"{path}: missing; docs/results.md names the command that makes it")
    return path.read_text()


def _read(name: str):
    return json.loads(_text(name))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table: a line a row, "|" between cells."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


# --- cells --------------------------------------------------------------------------------------------------

def _result(mean: float, ends) -> str:
    return f"{mean:.3f} {format_interval(ends, sign=False)}"


def _difference(against: dict) -> str:
    return f"{against['difference']:+.3f} {format_interval(against['interval'])}"


def _told_apart(against: dict) -> str:
    """A difference, bold where its interval is without 0."""
    return _bold_without(0, against["interval"], _difference(against))


def _bold_without(value: float, interval, text: str) -> str:
    """The text, bold where the interval does not hold the value."""
    low, high = interval
    return text if low <= value <= high else f"**{text}**"


def _p(against: dict) -> str:
    return f"p = {against['holm_p']:.3f}".replace("1.000", "1")


def _in_steps(arm: dict, metric: str) -> str:
    """An arm's speed-up in steps, and of how many seeds; of the reference nothing."""
    if "sooner" not in arm:
        return ""
    steps = arm["sooner"][metric]["step"]
    return f"{format_ratio(steps)}; {steps['n']} of {steps['of']}"


def _sooner(found: dict) -> str:
    """Speed-ups of one metric, {"step"[, "seconds"]}: in steps; in seconds; seeds."""
    steps = found["step"]
    if not steps["n"]:
        return f"never in reach; 0 of {steps['of']}"
    seconds = format_ratio(found["seconds"]) if "seconds" in found else "not compared"
    return f"{format_ratio(steps)}; {seconds}; {steps['n']} of {steps['of']}"


# --- tables -------------------------------------------------------------------------------------------------

def _score(name: str, row: str = "model") -> dict:
    """A row of a file that `evaluate.py score` wrote."""
    (score,) = _read(name).values()
    return next(each for each in score["rows"] if each["row"] == row)


def short() -> str:
    """README's: both default runs, and the main comparison of each task."""
    # Captions: event sets. One model with its interval over clips, the codec's ceiling, other seeds.
    model, ceiling = _score("t2a-shipped.json"), _score("t2a-shipped.json", "codec ceiling")
    seeds = [each["exact"] for each in _read("t2a-seeds.json")["seeds"]]
    captions = ["text-to-audio, default run, seed 0: all events of a caption detected and no others, "
                f"{model['n']} test clips",
                f"{_result(model['exact'], model['interval'])}; real clips through the codec "
                f"{ceiling['exact']:.3f}; mean of {len(seeds)} seeds {sum(seeds) / len(seeds):.3f}",
                "`python evaluate.py score assets/demo`; `results/t2a-shipped.json`, `t2a-seeds.json`"]

    # Super-resolution: energy score, likewise, beside a regression.
    model = _score("sr-shipped.json")
    energy = model["energy_score"]
    ridge, ceiling = (_score("sr-shipped.json", row)["energy_score"] for row in ("ridge", "codec ceiling"))
    restored = ["super-resolution, default run, seed 0: energy score (lower is better), "
                f"{model['n']} test clips",
                f"{_result(energy['mean'], energy['interval'])}; ridge regression {ridge['mean']:.3f}; codec "
                f"{ceiling['mean']:.3f}",
                "`python evaluate.py score assets/demo-sr --clips 100`; `results/sr-shipped.json`"]
    rows = [captions, restored]
    rows += [_short_comparison(task, folder) for task, folder in COMPARED.items()]
    return _markdown(["what", "result, 95 %", "command; file"], rows)


def _short_comparison(task: str, folder: str) -> list[str]:
    """stage minus static of one experiment, a row of README's table."""
    stage = next(row for row in _read(f"{folder}/summary.json") if row["arm"] == "stage")
    steps = _read(f"{folder}/experiment.json")["arms"]["stage"]["steps"]
    sooner = next(iter(stage["sooner"].values()))
    speed = f"speed-up in steps {format_ratio(sooner['step'])}"
    if "seconds" in sooner:
        speed += f", in seconds {format_ratio(sooner['seconds'])}"
    return [f"{task}: by stages minus constant, {stage['against']['n']} seeds, {steps:,} steps",
            f"{_difference(stage['against'])}; {speed}",
            f"`python -m lab.experiments table results/{folder}`"]


def first() -> str:
    """E1 of the first reading: the main metric, an arm a row."""
    rows = []
    for label, folder in FIRST.items():
        for arm in _in_order(_read(f"{folder}/summary.json")):
            row = [label, f"`{arm['arm']}`", _result(arm["mean"], arm["interval"]), "", ""]
            if "against" in arm:
                row[3:] = [f"{_difference(arm['against'])}, {_p(arm['against'])}",
                           _sooner(next(iter(arm["sooner"].values())))]
            rows.append(row)
            label = ""
    return _markdown(["E1 (arms: [below](#experiments))", "arm", "result", "difference from `static`",
                      "speed-up over `static` in steps; in seconds; seeds"], rows)


def answers() -> str:
    """Each question of ANSWERS to both tasks at full length: difference of the main metric with p, the
    fidelity axis of super-resolution, steps to the same quality."""
    captions, restored = _rows(FULL), _rows(FULL_SR)
    rows = []
    for question, (arm, other) in ANSWERS.items():
        cells = [*_answer(captions, arm, other), *_answer(restored, arm, other, fidelity=True)]
        rows.append([question, f"`{arm}` - `{other}`", *cells])
    return _markdown(["question", "arms", "captions: event sets", "speed-up in steps",
                      "super-resolution: energy score, lower is better", "LSD-HF, lower is better",
                      "speed-up in steps"], rows)


def _answer(rows: list[dict], arm: str, other: str, fidelity: bool = False) -> list[str]:
    """Cells of one comparison; empty where an arm was not run."""
    rows = [row for row in rows if row["arm"] in (arm, other)]
    summary = summarize(rows, {other: {}, arm: {}}, other) if rows else [{"n": 0}]
    if not all(row["n"] for row in summary):
        return [""] * (2 + fidelity)
    found = summary[1]
    against = found["against"]
    of_fewer = f", {against['n']} seeds" if against["n"] < 8 else ""
    cells = [f"{_told_apart(against)}, p = {against['p']:.3f}{of_fewer}"]
    if fidelity:
        others = secondary_metrics(rows, {arm: {}, other: {}}, sorted({row["seed"] for row in rows}), other)
        cells.append(_told_apart(others[arm]["lsd_hf"]))
    steps = next(iter(found["sooner"].values()))["step"]
    return [*cells, _bold_without(1, steps["interval"], format_ratio(steps))]


def _rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in _text(f"{folder}/rows.jsonl").splitlines()]


def full() -> str:
    """The main comparison of captions at full length: the main metric, then both axes at w = 1 and at the w
    that each run chose; of each arm the mean over seeds, and the difference from `static`."""
    axes = {(row["view"], row["arm"]): row["axes"] for row in _read(f"{FULL}/plane.json")}
    rows = []
    for arm in _in_order(_read(f"{FULL}/summary.json")):
        measured = [arm, *axes["w1", arm["arm"]], *axes["tuned", arm["arm"]]]
        speed = _in_steps(arm, "event_accuracy")
        rows.append([f"`{arm['arm']}`", str(arm["n"]), *map(_beside, measured), speed])
    head = ["captions", "seeds", "event sets, w = 2.5", "event sets, w = 1", "texture, w = 1",
            "event sets, tuned w", "texture, tuned w", "speed-up in steps; seeds"]
    return _markdown(head, rows)


def full_sr() -> str:
    """The main comparison of super-resolution at full length: both axes of the final table, and times to the
    quick energy score."""
    axes = {row["arm"]: row["axes"] for row in _read(f"{FULL_SR}/plane.json")}
    rows = []
    for arm in _in_order(_read(f"{FULL_SR}/summary.json")):
        speed = _in_steps(arm, "energy_score")
        rows.append([f"`{arm['arm']}`", str(arm["n"]), *map(_beside, axes[arm["arm"]]), speed])
    return _markdown(["super-resolution", "seeds", "energy score", "LSD-HF",
                      "speed-up in steps; seeds"], rows)


def _beside(found: dict) -> str:
    """A mean over seeds, and its difference from the reference."""
    if "against" not in found:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f}, {_difference(found['against'])}"


def screen() -> str:
    """Arms of development seeds at full length, super-resolution: the energy score on the way and both axes
    at the end, on validation clips; the energy score of test clips, which nothing was chosen by."""
    spec = _read(f"{SCREEN}/experiment.json")
    runs = {}  # (arm, seed) -> {step: row}
    for row in _rows(SCREEN):
        runs.setdefault((row["arm"], row["seed"]), {})[row["step"]] = row
    lines = []
    for arm in spec["arms"]:
        own = [runs[arm, seed] for seed in spec["seeds"] if (arm, seed) in runs]
        ends = [run[max(run)] for run in own]
        cells = [[run[step]["energy_score"] for run in own] for step in ON_THE_WAY]
        cells += [[end[name] for end in ends] for name in ("lsd_hf", "val_loss")]
        cells.append([end["final"]["energy_score"] for end in ends])
        lines.append([arm, *("; ".join(f"{value:.3f}" for value in cell) for cell in cells)])
    seeds = "; ".join(map(str, spec["seeds"]))
    return _markdown([f"seeds {seeds}: energy score at step", *(f"{step:,}" for step in ON_THE_WAY), "LSD-HF",
                      "loss", "test clips: energy score"], lines)


def _in_order(summary: list[dict]) -> list[dict]:
    """Arms with finished runs, the reference first."""
    done = [arm for arm in summary if arm["n"]]
    return sorted(done, key=lambda arm: "against" in arm)


TABLES = {"short": short, "answers": answers, "first": first, "full": full, "full_sr": full_sr,
          "screen": screen}


# --- pages --------------------------------------------------------------------------------------------------

def filled(text: str, page: str) -> str:
    """A page's text with every marked table written anew. UserError: a mark that names no table or has no
    end."""
    starts = re.findall(r"<!-- table: (\w+) -->", text)
    for name in starts:
        if name not in TABLES:
            raise UserError(f"{page}: table {name!r}: must be one of {', '.join(TABLES)}")
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?\n(<!-- end -->)", re.DOTALL)
    text, found = pattern.subn(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}\n{mark[3]}", text)
    if found != len(starts):
        raise UserError(f"{page}: a table without <!-- end -->")
    return text


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.result_tables")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page differs")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        old = (ROOT / page).read_text()
        new = filled(old, page)
        if new != old:
            stale.append(page)
            if not args.check:
                write_text(ROOT / page, new)
    said = "differ from the files in results/" if args.check else "written anew"
    print(f"{', '.join(stale) or 'no page'}: {said}")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    run_cli(main)
