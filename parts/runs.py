"""The run folder: what a training run leaves behind, written so that a crash at any moment costs little.

    config.json               every setting, resolved (parts/config.py)
    checkpoint.pt             weights, their average, optimizer, regime, groups; weights-only loadable
    checkpoint-previous.pt    the one before, in case the newest is damaged
    log.jsonl                 one JSON object a line: losses and what drives them, evaluations
    index.html                the run as a page on which training time is a slider (parts/page.py)
    moments/                  the sounds of that page (parts/moments.py)
    samples/, dashboard.png, scores.json, bad.txt, .lock

A folder may come from somebody else, so nothing in it is believed: fields are checked as if they had been
typed, and loading runs no code. Errors are UserErrors that name the folder, the file and the fix.

Public: open_settings, evaluation_due, Log, read_log, read_scores, RunLock.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path

from parts.checkpoints import has_checkpoint, load_checkpoint, not_written
from parts.config import (
    TRUST,
    WITH_RESUME,
    Config,
    compiles_by_default,
    load_config,
    refuse_out_of_range,
    resolve,
)
from parts.devices import RANK, WORLD, broadcast_from_rank0, join_processes, pick_device
from parts.errors import Stopped, UserError, quoted
from parts.files import file_lock, read_json, reading, to_json, write_text

# --- settings -----------------------------------------------------------------------------------------------

def open_settings(given: dict, resume: str) -> tuple[Config, dict | None]:
    """Settings of a run and the checkpoint to go on from (None: from the start).

    given: what the user typed; resume: run folder or "". Of several processes, number 0 reads and decides for
    all."""
    if WORLD == 1:
        return _settings(given, resume)
    device = given.get("device", "auto")
    if resume and "device" not in given:
        with contextlib.suppress(UserError):               # process 0 says below what is wrong, for all
            device = pick_device(load_config(Path(resume))["device"])
    device = join_processes(pick_device(device))
    outcome = None
    if RANK == 0:
        try:
            outcome = _settings(given, resume)
        except UserError as e:
            outcome = e
    outcome = broadcast_from_rank0(outcome)
    if isinstance(outcome, UserError):
        raise outcome if RANK == 0 else SystemExit(2)  # one voice
    cfg, checkpoint = outcome
    if cfg.batch % (WORLD * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch}: must be a multiple of {WORLD} processes x {cfg.accumulate} "
                        "parts (--accumulate)")
    if cfg.compares_clips and cfg.batch == WORLD * cfg.accumulate:
        raise UserError(f"--batch {cfg.batch}: must be more than {WORLD} processes x {cfg.accumulate} parts: "
                        "the structure loss and shuffled features compare clips of one part")
    if device.startswith("cuda"):
        cfg = dataclasses.replace(cfg, device=device)
    return cfg, checkpoint


def _settings(given: dict, resume: str) -> tuple[Config, dict | None]:
    # A new run: its folder must be free.
    if not resume:
        cfg = resolve(given)
        out = Path(cfg.out)
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: must be a folder, and this is a file")
        if out.exists() and any(out.iterdir()):
            is_run = (out / "config.json").is_file()
            or_resume = f"resume it with --resume {quoted(out)}, or " if is_run else ""
            raise UserError(f"--out {out}: folder is not empty; {or_resume}choose another")
        return cfg, None

    # One that goes on; if it died before its first checkpoint, from the start.
    checkpoint = None
    if has_checkpoint(Path(resume)):
        fields, checkpoint = load_checkpoint(Path(resume))
        if "optimizer" not in checkpoint:
            raise UserError(f"--resume {resume}: an exported checkpoint (no optimizer state); it can be "
                            "used, not continued")
    else:
        fields = load_config(Path(resume))
    if "data" in given and not (checkpoint and "data" in checkpoint):
        raise UserError(f"--resume {resume}: --data names where its recordings lie now, and it has none yet "
                        "to compare them with; begin a new run")
    _refuse_edited(resume, fields, checkpoint)
    untrusting = dict.fromkeys(TRUST, False)
    cfg = dataclasses.replace(Config(**fields), out=resume, **{**untrusting, **given})
    cfg.device = pick_device(cfg.device)
    if cfg.device.split(":")[0] != fields["device"].split(":")[0]:  # what was right there may not be here
        cfg.compile = compiles_by_default(cfg.device)
    refuse_out_of_range(cfg)
    if checkpoint and "steps" in given and cfg.steps <= checkpoint["step"]:
        raise UserError(f"--steps {cfg.steps}: {resume} already has {checkpoint['step']} steps; "
                        "give a larger number")
    return cfg, checkpoint


def _refuse_edited(resume: str, fields: dict, checkpoint: dict | None) -> None:
    """UserError where config.json was changed since the checkpoint was written: half of the run would have
    other settings than it says."""
    saved = checkpoint["config"] if checkpoint else {}
    for name, value in fields.items():
        if name not in (*WITH_RESUME, "out", "compile") and saved.get(name, value) != value:
            raise UserError(f"--resume {resume}: {name} is {value!r} in its config.json and was "
                            f"{saved[name]!r} so far; a run keeps its settings: write that back, or begin a "
                            "new run")


def evaluation_due(cfg: Config, k: int, j: int | None) -> bool:
    """Is step k, the j-th probe step or none, one after which a run is evaluated? Every eval_every-th is, or,
    where that is 0, each half doubling from step 64 (there are four probes a doubling); and the last one."""
    if cfg.eval_every:
        due = k % cfg.eval_every == 0
    else:
        due = k >= 64 and j is not None and j % 2 == 0
    return due or k == cfg.steps


# --- log and lock -------------------------------------------------------------------------------------------

class Log:
    """log.jsonl of a run, opened to go on after `step`: later lines (of a run that died after its checkpoint)
    and a torn last one are dropped. Call it with a dict to write a line."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = _whole_lines(path) if path.exists() else []
        rows = [_row(line) for line in lines]
        up_to_step = [line for line, row in zip(lines, rows) if row is not None and row["step"] <= step]
        write_text(path, "".join(line + "\n" for line in up_to_step))
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def __call__(self, row: dict) -> None:
        try:
            self.file.write(to_json(row) + "\n")
        except OSError as e:
            raise not_written(self.path, e.strerror) from None

    def sync(self) -> None:
        """Before a checkpoint: after a power cut no line up to it may be missing."""
        os.fsync(self.file.fileno())


def read_log(folder: Path) -> list[dict]:
    """Rows of a run's log.jsonl, but for a last line that was cut off while it was written. UserError: no
    such file, or another line that is no row."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: no log.jsonl")
    rows = [_row(line) for line in _whole_lines(path)]
    if None in rows:
        raise UserError(f"{path}, line {rows.index(None) + 1}: damaged, no row of a log; take it out, or "
                        "resume the run to have it taken out")
    return rows


def read_scores(folder: Path) -> dict | None:
    """{"protocol": {}, "rows": {name: row}} of a run's final table, scores.json; None where there is none.
    UserError where it is damaged."""
    path = folder / "scores.json"
    if not path.is_file():
        return None
    with reading(path, f"score the run again: python evaluate.py score {folder} --out {path}"):
        (score, *_) = read_json(path).values()
        protocol, rows = dict(score["protocol"]), {row["row"]: row for row in score["rows"]}
        if "model" not in rows:
            raise KeyError("model")
    return {"protocol": protocol, "rows": rows}


def _whole_lines(path: Path) -> list[str]:
    """Lines of a log; what follows the last line end was cut off while it was written."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


# What the row of a step holds at least, and that of an evaluation.
OF_STEP = ("loss_fm", "r", "lambda", "mu", "density")
OF_EVALUATION = ("val_loss", "val_loss_t")
# What a row holds that is no number.
NOT_NUMBERS = {"density": dict, "eval": dict, "D_of": dict, "agreement_t": dict, "structure": dict,
               "clips": list}


def _row(line: str) -> dict | None:
    """A line of a log; None where it is no row, which has a step, lacks anything or holds anything of the
    wrong kind."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    for name, value in row.items():
        if not (isinstance(value, NOT_NUMBERS[name]) if name in NOT_NUMBERS else _is_number(value)):
            return None
    lacks = [name for name in OF_STEP if name not in row] if "loss" in row else []
    lacks += [name for name in OF_EVALUATION if name not in row["eval"]] if "eval" in row else []
    if lacks:
        return None
    evaluated = dict(row.get("eval", {}))
    by_t = evaluated.pop("val_loss_t", [])                 # a number a noise level
    if not isinstance(by_t, list):
        return None
    by_name = (evaluated, row.get("D_of", {}), row.get("agreement_t", {}))
    numbers = [*by_t, *(value for values in by_name for value in values.values())]
    driven = [row[name] for name in ("r", "lambda", "mu") if name in row]
    return row if all(map(_is_number, numbers)) and None not in driven else None


def _is_number(value) -> bool:
    """null too, which stands for NaN"""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


class RunLock(contextlib.ExitStack):
    """`with RunLock() as lock: lock.claim(folder)`: no other process may train there until the end of the
    block. A folder that the block refuses (UserError) is left as it was found; a block that is interrupted
    says how the run goes on."""
    folder: Path | None = None

    def __exit__(self, kind, error, trace):
        handled = super().__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt) and self.folder:
            raise Stopped(f"stopped; continue with: python train.py --resume {quoted(self.folder)}") from None
        return handled

    def claim(self, folder: Path) -> None:
        """UserError where another process does."""
        refuse = f"{folder}: another process is training this run; wait for it, or end it"
        path = folder / ".lock"
        was_there = path.exists()
        self.enter_context(file_lock(path, refuse))
        self.folder = folder
        if not was_there:
            # Called before the lock is released: nobody else can have claimed the folder meanwhile.
            self.push(functools.partial(_remove_where_refused, path))


def _remove_where_refused(path: Path, kind, error, trace) -> None:
    """At the end of a block that ended with `error`: the lock file goes where the folder was refused, and
    stays where training went well, was stopped or broke off."""
    if isinstance(error, UserError) and not isinstance(error, Stopped):
        with contextlib.suppress(OSError):  # gone with its folder
            path.unlink()
