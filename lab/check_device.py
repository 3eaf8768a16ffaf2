"""Does everything run on this device, and how well? One command, at most eight minutes on a GPU.

    python -m lab.check_device                          # the device that train.py would take
    python -m lab.check_device --preset small --out runs/check-small
    python -m lab.check_device --only t2a resume        # some of the parts

A part is tried in a process of its own with a time limit, so that one that fails or hangs costs the others
nothing; what it says goes to OUT/PART.txt. Training has all that a step can have: structure and guidance
constant, every probe.

    machine     versions, name and memory of the device, the rate of a large matrix product
    t2a, sr     200 steps of each task
    accumulate  20 steps with --accumulate 4 --checkpointing
    resume      20 steps, then 20 resumed, give the weights of 40 in one go; where not, the 40 run again as a
                control (no structure loss)
    generate    a caption to sound, by the run of t2a
    upsample    a muffled signal to sound, by the run of sr
    waits       how often the processor waits for the GPU in a step: at most once
    compiled    torch.compile, 200 steps
    bench       the step against a plain DiT's (lab/bench.py, few rounds)

Comes in: a device, a preset. Goes out: a table and OUT/check.json: of each part whether it passed, its
seconds, ms a step (median, without probes), waits a step (of a step that neither logs nor measures; GPU
only), share (FLOP of a step by count, lab/estimate.py, over seconds, as a share of the best rate of a large
matrix product in that process), peak memory (on a CPU: at the end). Exit status 1 where a part failed.

Public: PARTS, Check, Waits, run_part, check, table.
"""
from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import train
from lab import bench as benchmark
from lab.estimate import count_step
from parts import config
from parts.arguments import Parser, whole
from parts.audio import RATE, write_wav
from parts.checkpoints import load_checkpoint
from parts.config import Config
from parts.devices import hardware, memory_mb, pick_device, pick_precision
from parts.errors import UserError, run_cli
from parts.files import to_json, write_text
from parts.runs import read_log

ROOT = Path(__file__).resolve().parents[1]
# All that a step can have, on few clips.
TRAINING = {"structure": "constant", "guidance": "constant", "probe": "always", "clips": 1_000,
            "score_clips": 16, "compile": False}
PACKAGES = ("numpy", "scipy", "torchaudio", "einops", "matplotlib", "safetensors", "filelock", "soundfile",
            "transformers")
MARK = "called a synchronizing"  # how torch's warning about a wait begins


@dataclass
class Check:
    """What is asked of every part. options: settings of train.py that are laid over the preset."""
    device: str
    preset: str
    steps: int
    options: dict
    out: Path


# --- waits --------------------------------------------------------------------------------------------------

class Waits:
    """Counts, step by step, how often training waits for a GPU: `with Waits(device) as waits:` around
    train.train. On other devices nothing is counted."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")
        self.places = collections.Counter()    # of the step under way: "file.py:line" -> waits
        self.steps = []                        # of the steps before

    def __enter__(self) -> Waits:
        self.update = train.update
        train.update = self._update_and_count
        if self.on_gpu:
            self.caught = warnings.catch_warnings()
            self.caught.__enter__()
            self.show = warnings.showwarning
            warnings.simplefilter("always")
            warnings.showwarning = self._note
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error) -> None:
        train.update = self.update
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(*error)

    def _note(self, message, category, filename, line, *more) -> None:
        if MARK in str(message):
            self.places[f"{Path(filename).name}:{line}"] += 1
        else:
            self.show(message, category, filename, line, *more)

    def _update_and_count(self, *args):
        """A step ends with its update: what follows (a log line, an evaluation) counts for the next one."""
        norm = self.update(*args)
        self.steps.append(self.places)
        self.places = collections.Counter()
        return norm

    def of_a_step(self) -> collections.Counter | None:
        """Places of the median step, most of which neither log nor measure; None: not on a GPU."""
        if not self.on_gpu or not self.steps:
            return None
        by_number = sorted(self.steps, key=lambda places: places.total())
        return by_number[(len(by_number) - 1) // 2]


# --- parts: each returns what the table shows, or raises ----------------------------------------------------

def _train(ask: Check, name: str, steps: int, **more) -> dict:
    """Train into OUT/name; UserError where a step was skipped. -> ms a step, waits, share, note."""
    given = {**TRAINING, **ask.options, **more, "device": ask.device, "preset": ask.preset, "steps": steps,
             "eval_every": steps, "out": str(ask.out / name)}
    with Waits(ask.device) as waits:
        folder = train.train(given)
    log = read_log(folder)
    skipped = [line["step"] for line in log if "skipped" in line]
    if skipped:
        raise UserError(f"{len(skipped)} of {steps} steps had no finite gradient, the first is {skipped[0]}")

    # Later steps: the first ones warm up (and compile).
    lines = [line for line in log if "loss" in line]
    plain = [line for line in lines if "D" not in line and line["step"] > steps / 2]
    seconds = float(np.median([line["step_s"] for line in plain or lines]))
    cfg = Config(**config.load_config(folder))
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    rate = benchmark.matmul_rate(cfg.device, dtype)
    places = waits.of_a_step()
    return {"step_ms": 1e3 * seconds, "waits": None if places is None else places.total(),
            "share": count_step(cfg, clips=4).flop / seconds / rate,
            "note": f"{cfg.precision}, loss {lines[0]['loss']:.2f} to {lines[-1]['loss']:.2f}",
            "waits_at": dict(places or {})}


def machine(ask: Check) -> dict:
    precision = pick_precision(ask.device)
    rate = benchmark.matmul_rate(ask.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
             "device": hardware(ask.device), "precision": precision, "matmul_flop_per_s": rate,
             "packages": {}}
    for package in PACKAGES:
        try:
            found["packages"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][package] = None
    if ask.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(ask.device)
        found |= {"memory_gb": properties.total_memory / 1e9,
                  "capability": f"{properties.major}.{properties.minor}"}
    missing = [package for package, version in found["packages"].items() if version is None]
    without = f"; without {', '.join(missing)}" if missing else ""
    note = f"{found['device']}, torch {found['torch']}, {precision} at {rate / 1e12:.2f} TFLOP/s{without}"
    return {**found, "note": note}


def t2a(ask: Check) -> dict:
    return _train(ask, "t2a", ask.steps, task="t2a")


def sr(ask: Check) -> dict:
    return _train(ask, "sr", ask.steps, task="sr", variants=1)


def accumulate(ask: Check) -> dict:
    return _train(ask, "accumulate", max(1, ask.steps // 10), accumulate=4, checkpointing=True)


def resume(ask: Check) -> dict:
    """The largest difference of a weight. At constant rates (cool = 0) a run that is extended is the longer
    run. Where two runs of the same steps differ, as they may on a GPU, a resumed one may differ as much."""
    half = max(1, ask.steps // 10)
    given = {**TRAINING, "preset": "smoke", **ask.options, "recipe": "static", "structure": "off",
             "probe": "auto", "cool": 0.0, "device": ask.device, "score_clips": 4, "eval_every": 0}

    def weights_of(name: str, steps: int) -> dict:
        folder = train.train({**given, "steps": steps, "out": str(ask.out / name)})
        return load_checkpoint(folder)[1]["model"]

    whole_run = weights_of("whole", 2 * half)
    weights_of("resumed", half)
    train.train({"steps": 2 * half}, str(ask.out / "resumed"))
    off = _distance(whole_run, load_checkpoint(ask.out / "resumed")[1]["model"])
    again = _distance(whole_run, weights_of("again", 2 * half)) if off else 0.0
    if not off <= 3 * again:  # also where it is not a number
        raise UserError(f"a resumed run is off by {off:.2g}, the same run again by {again:.2g}")
    return {"off": off, "again": again, "note": f"off by {off:.2g}, the same run again by {again:.2g}"}


def _distance(a: dict, b: dict) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def generate(ask: Check) -> dict:
    run = evaluate.load_run(ask.out / "t2a", ask.device)
    made, seconds = _second_time(lambda: evaluate.generate(run, ["a low bell"], [0]))
    _check_sound(made[0], round(run.config["seconds"] * RATE))
    write_wav(ask.out / "generated.wav", made[0])
    return {"note": f"a clip in {seconds:.2f} s"}


def upsample(ask: Check) -> dict:
    run = evaluate.load_run(ask.out / "sr", ask.device)
    muffled = np.random.default_rng(0).standard_normal(50_000).astype(np.float32) / 9
    made, seconds = _second_time(lambda: evaluate.upsample_long(run, muffled, 2_000.0, progress=False))
    _check_sound(made, len(muffled))
    write_wav(ask.out / "upsampled.wav", made)
    return {"note": f"{len(made) / RATE:.1f} s of sound in {seconds:.2f} s"}


def _second_time(function: Callable) -> tuple:
    """What it returns, and its seconds after a first call that warms up."""
    function()
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def _check_sound(x: np.ndarray, n: int) -> None:
    if len(x) < n or not np.isfinite(x).all() or not np.abs(x).max() > 0:
        raise UserError(f"{len(x)} samples where {n} were asked for, or silence, or not finite")


def waits(ask: Check) -> dict:
    if not ask.device.startswith("cuda"):
        return {"left_out": f"there is nothing to wait for on {ask.device}"}
    found = _train(ask, "waits", max(4, ask.steps // 5), task="t2a")
    where = ", ".join(f"{place} x {n}" for place, n in found["waits_at"].items())
    if found["waits"] > 1:
        raise UserError(f"a plain step waits {found['waits']} times: {where}")
    return {**found, "note": where}


def compiled(ask: Check) -> dict:
    found = _train(ask, "compiled", ask.steps, task="t2a", compile=True)
    eager = ask.out / "t2a.json"
    if eager.is_file():
        times = json.loads(eager.read_text())["step_ms"] / found["step_ms"]
        found["note"] += f", {times:.2f} times as fast as eager"
    return found


def bench(ask: Check) -> dict:
    found = benchmark.bench(ask.device, ask.preset, rounds=6, out=ask.out / "bench.json")
    precision, notes = pick_precision(ask.device), []
    rows = {}
    for row in found["steps"]:
        if row["arm"] == "stage" and row["precision"] == precision:
            rows[row["task"]] = row
            notes.append(f"{row['task']} {row['against_plain']['ratio']:.2f} times as fast as a plain DiT")
    return {"step_ms": rows["t2a"]["step_ms"], "share": rows["t2a"].get("share_of_matmul"),
            "note": ", ".join(notes)}


# In this order; with the most seconds that each may take.
PARTS: dict[str, tuple[Callable[[Check], dict], int]] = {
    "machine": (machine, 60), "t2a": (t2a, 100), "sr": (sr, 100), "accumulate": (accumulate, 60),
    "resume": (resume, 100), "generate": (generate, 40), "upsample": (upsample, 40), "waits": (waits, 60),
    "compiled": (compiled, 150), "bench": (bench, 120),
}


# --- each in a process of its own ---------------------------------------------------------------------------

def do_part(name: str, ask: Check) -> None:
    """In the part's own process: do it, and leave what it found in OUT/NAME.json."""
    found = PARTS[name][0](ask)
    found = {"memory_mb": memory_mb(ask.device), **found}
    write_text(ask.out / f"{name}.json", to_json(found, indent=1) + "\n")


def command_of(name: str, ask: Check) -> list[str]:
    """The command line of a part's process."""
    return [sys.executable, "-m", "lab.check_device", "--part", name, "--device", ask.device,
            "--preset", ask.preset, "--steps", str(ask.steps), "--options", to_json(ask.options),
            "--out", str(ask.out)]


def run_part(name: str, command: list[str], limit_s: float, out: Path) -> dict:
    """Run a part's command -> its row {part, passed (None: left out), seconds, note, and what it found}."""
    began, said = time.perf_counter(), out / f"{name}.txt"
    # The project is found wherever the command was started; matplotlib opens no window.
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with open(said, "wb") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                    timeout=limit_s, check=False).returncode
            why = _last_line(said) or f"ended with status {status}"
        except subprocess.TimeoutExpired:
            status, why = None, f"took longer than {limit_s:.0f} s"
    row = {"part": name, "passed": False, "seconds": time.perf_counter() - began, "note": why}
    found = out / f"{name}.json"
    if status != 0 or not found.is_file():
        return row
    row |= {"passed": True, "note": "", **json.loads(found.read_text())}
    if "left_out" in row:
        row |= {"passed": None, "note": row.pop("left_out")}
    return row


def _last_line(file: Path) -> str:
    """The last line that a command said; progress bars write theirs over and over."""
    lines = file.read_bytes().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def check(ask: Check, names: list[str], minutes: int) -> list[dict]:
    """Try the parts one after another, all within these minutes -> their rows, also in OUT/check.json, which
    is written after each of them."""
    end, rows = time.perf_counter() + 60 * minutes, []
    bar = tqdm(names, desc="checking", unit="part", dynamic_ncols=True)
    for name in bar:
        bar.set_postfix_str(name)
        left = end - time.perf_counter()
        if left > 0:
            rows.append(run_part(name, command_of(name, ask), min(PARTS[name][1], left), ask.out))
        else:
            note = f"the {minutes} minutes were over; --minutes gives more"
            rows.append({"part": name, "passed": False, "seconds": 0.0, "note": note})
        result = {**dataclasses.asdict(ask), "out": str(ask.out), "rows": rows}
        write_text(ask.out / "check.json", to_json(result, indent=1) + "\n")
    return rows


# --- table and command --------------------------------------------------------------------------------------

RESULTS = {True: "passed", False: "FAILED", None: "left out"}


def table(rows: list[dict]) -> str:
    lines = ["part        result    seconds  ms a step  waits  share  memory MB  "]
    for row in rows:
        cells = [f"{row['part']:12s}{RESULTS[row['passed']]:9s}{row['seconds']:8.1f}"]
        for key, width, form in (("step_ms", 11, ".1f"), ("waits", 7, "d"), ("share", 7, ".0%"),
                                 ("memory_mb", 11, ".0f")):
            value = row.get(key)
            cells.append(f"{'-' if value is None else format(value, form):>{width}s}")
        lines.append("".join(cells) + f"  {row['note']}")
    return "\n".join(lines)


def _read_options(text: str, preset: str) -> dict:
    """--options as typed -> settings; UserError where train.py has no such setting."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"--options {text[:40]}: must be settings of train.py as JSON ({e.msg})") from None
    known = {field.name for field in dataclasses.fields(Config)} - {"out", "device", "preset", "steps"}
    if not isinstance(options, dict):
        raise UserError(f"--options {text[:40]}: must be an object of settings of train.py")
    for name in options:
        if name not in known:
            raise UserError(f"--options: {name!r} is none of train.py's settings, or has a flag here")
    config.resolve({**options, "preset": preset, "device": "cpu", "out": "unused"})
    return options


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", choices=config.CHOICES["preset"], default="auto")
    parser.add_argument("--out", type=Path, help="folder; default runs/check, numbered when taken")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--steps", type=whole(1), default=200, help="of the longer runs")
    parser.add_argument("--minutes", type=whole(1), default=8, help="that all parts may take together")
    parser.add_argument("--options", default="{}", metavar="JSON",
                        help="settings of train.py for all runs, such as {\"width\": 64}")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    preset = "smoke" if args.preset == "auto" else args.preset
    out = args.out or Path(config.free_folder("runs/check"))
    options = _read_options(args.options, preset)
    ask = Check(pick_device(args.device), preset, args.steps, options, out.absolute())
    if args.part:
        do_part(args.part, ask)
        return

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not an empty folder; choose another")
    out.mkdir(parents=True, exist_ok=True)
    rows = check(ask, [name for name in PARTS if name in args.only], args.minutes)
    print(table(rows))
    failed = [row["part"] for row in rows if row["passed"] is False]
    print(f"{len(rows) - len(failed)} of {len(rows)} parts without a failure, in {out / 'check.json'}")
    if failed:
        print(f"failed: {', '.join(failed)}; what each said is in {out}, PART.txt")
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
