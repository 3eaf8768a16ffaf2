"""The run folder: what a training run leaves behind, written so that a crash at any moment costs little.

    config.json               every setting, resolved (parts/config.py)
    checkpoint.pt             weights, their average, optimizer, regime, groups; weights-only loadable
    checkpoint-previous.pt    the one before, in case the newest is damaged
    log.jsonl                 one JSON object a line: losses and what drives them, evaluations
    samples/, dashboard.png, scores.json, bad.txt, .lock

A folder may come from somebody else, so nothing in it is believed: fields are checked as if they had been
typed, and loading runs no code. Errors are UserErrors that name the folder, the file and the fix.

Public: VERSION, CHECKPOINTS, open_settings, load_config, save_config, load_checkpoint, has_checkpoint,
save_checkpoint, export, load_weights, Log, not_written, RunLock.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from parts.config import TRUST, Config, resolve, validate_config
from parts.devices import RANK, WORLD, broadcast_from_rank0, join_processes, pick_device
from parts.errors import UserError
from parts.files import file_lock, write_text

# Raised when saved weights or settings change their meaning. 1: RMSNorm in attention; 2: other names of
# settings.
VERSION = 3
CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")  # newest first


# --- settings -----------------------------------------------------------------------------------------------

def open_settings(given: dict, resume: str) -> tuple[Config, dict | None]:
    """Settings of a run and the checkpoint to go on from (None: from the start).

    given: what the user typed; resume: run folder or "". Of several processes, number 0 reads and decides for
    all."""
    if WORLD == 1:
        return _settings(given, resume)
    device = join_processes(pick_device(given.get("device", "auto")))
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
    if device.startswith("cuda"):
        cfg = dataclasses.replace(cfg, device=device)
    return cfg, checkpoint


def _settings(given: dict, resume: str) -> tuple[Config, dict | None]:
    # A new run: its folder must be free.
    if not resume:
        cfg = resolve(given)
        if Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
            raise UserError(f"--out {cfg.out}: folder is not empty; resume it with --resume {cfg.out}, "
                            "or choose another")
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
    untrusting = dict.fromkeys(TRUST, False)
    cfg = dataclasses.replace(Config(**fields), out=resume, **{**untrusting, **given})
    cfg.device = pick_device(cfg.device)
    if checkpoint and "steps" in given and cfg.steps <= checkpoint["step"]:
        raise UserError(f"--steps {cfg.steps}: {resume} already has {checkpoint['step']} steps; "
                        "give a larger number")
    return cfg, checkpoint


def save_config(folder: Path, cfg: Config) -> None:
    write_text(folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")


def load_config(folder: Path) -> dict:
    """config.json of a run folder, each field checked as if it had been typed; UserError names the field."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: not a run folder (no config.json)")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({str(e)[:120]})") from None
    wrong = validate_config(fields)
    if wrong:
        raise UserError(f"{file}: {wrong}")
    return fields


# --- checkpoints --------------------------------------------------------------------------------------------

def has_checkpoint(folder: Path) -> bool:
    """Is there one that load_checkpoint could try?"""
    return any((folder / name).is_file() for name in CHECKPOINTS)


def load_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(settings, checkpoint) of a run folder, or of the checkpoint before it, with a warning, where the
    newest can't be read. Weights-only loading, so a file from elsewhere can't run code."""
    fields, failed = load_config(folder), []
    for name in CHECKPOINTS:
        try:
            checkpoint = torch.load(folder / name, map_location="cpu", weights_only=True)
            checkpoint = {"config": {}, **checkpoint, "step": int(checkpoint["step"])}
        except FileNotFoundError:
            continue
        except Exception as e:  # zip, pickle and key errors all mean the same to the user
            first_line = (str(e).splitlines() or [""])[0]
            failed.append(f"{name}: {type(e).__name__}: {first_line[:120]}")
            continue
        _check_same_run(folder, name, fields, checkpoint)
        if name != CHECKPOINTS[0]:
            what = f"is damaged ({failed[0]})" if failed else "is missing"
            print(f"warning: {folder / CHECKPOINTS[0]} {what}; going on from {name}, "
                  f"step {checkpoint['step']}", file=sys.stderr)
        return fields, checkpoint
    if failed:
        raise UserError(f"{folder}: checkpoint can't be read ({'; '.join(failed)})")
    raise UserError(f"{folder}: not a run folder (no checkpoint.pt)")


def _check_same_run(folder: Path, name: str, fields: dict, checkpoint: dict) -> None:
    """UserError for a checkpoint of another version, or of another run than config.json."""
    version = checkpoint.get("version", 1)
    if version != VERSION:
        raise UserError(f"{folder / name}: of version {version}, this code reads version {VERSION}; "
                        "use the code that made it, or train anew")
    saved = dict(checkpoint["config"])
    for field in ("task", "codec", "text", "channels", "width", "depth", "heads"):
        if fields[field] != saved.get(field):
            raise UserError(f"{folder}: {field} is {fields[field]!r} in config.json and "
                            f"{saved.get(field)!r} in {name}; one of them is from another run")


def save_checkpoint(path: Path, **state) -> None:
    """Write, flush, read back, rename; the one before it stays as checkpoint-previous.pt. A crash at any
    moment leaves one that can be read."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"version": VERSION, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        torch.load(temporary, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as e:  # torch wraps a full disk in a RuntimeError of its own
        temporary.unlink(missing_ok=True)
        system_errors = [x.strerror for x in (e, e.__context__) if isinstance(x, OSError) and x.strerror]
        why = system_errors[0] if system_errors else str(e).splitlines()[0][:120]
        raise not_written(path, why) from None
    if path.exists():
        os.replace(path, path.with_name(CHECKPOINTS[1]))
    os.replace(temporary, path)


def export(run: Path, folder: Path) -> None:
    """EMA weights in half precision, codec, vocabulary and settings: everything that using a run needs.
    UserError where the folder holds a run that can still be trained."""
    fields, checkpoint = load_checkpoint(run)
    if has_checkpoint(folder) and "optimizer" in load_checkpoint(folder)[1]:
        raise UserError(f"{folder}: holds a run that can still be trained; export to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    cfg = Config(**{**fields, "out": ""})                  # the path is of this machine
    ema = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    save_checkpoint(folder / CHECKPOINTS[0], step=checkpoint["step"], ema=ema, codec=checkpoint["codec"],
                    words=checkpoint["words"], config=dataclasses.asdict(cfg))
    (folder / CHECKPOINTS[1]).unlink(missing_ok=True)      # of an export that stood here
    save_config(folder, cfg)


def not_written(path: Path, why: str) -> UserError:
    """What to say where a run's file can't be written."""
    return UserError(f"{path}: can't be written ({why}); the last checkpoint is intact: make room, then "
                     f"python train.py --resume {path.parent}")


def load_weights(path: str | Path, module: nn.Module, state: dict, **how) -> None:
    """load_state_dict whose refusal is one line: which weights are missing, unknown or of another shape."""
    try:
        module.load_state_dict(state, **how)
    except RuntimeError as e:
        detail = "; ".join(line.strip() for line in str(e).splitlines()[1:3])
        raise UserError(f"{path}: its weights are those of another model or version "
                        f"({detail[:160]})") from None


# --- log and lock -------------------------------------------------------------------------------------------

class Log:
    """log.jsonl of a run, opened to go on after `step`: later lines (of a run that died after its checkpoint)
    and a torn last one are dropped. Call it with a dict to write a line."""

    def __init__(self, path: Path, step: int):
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        whole_lines = text.split("\n")[:-1]  # what follows the last line end was cut off while it was written
        write_text(path, "".join(line + "\n" for line in whole_lines if _written_by(line, step)))
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def __call__(self, row: dict) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise not_written(self.path, e.strerror) from None

    def sync(self) -> None:
        """Before a checkpoint: after a power cut no line up to it may be missing."""
        os.fsync(self.file.fileno())


def _written_by(line: str, step: int) -> bool:
    """Is this a log line of a step up to `step`?"""
    try:
        return json.loads(line)["step"] <= step
    except ValueError:
        return False


class RunLock(contextlib.ExitStack):
    """`with RunLock() as lock: lock.claim(folder)`: no other process may train there until the end of the
    block."""

    def claim(self, folder: Path) -> None:
        """UserError where another process does."""
        refuse = f"{folder}: another process is training this run; wait for it, or end it"
        self.enter_context(file_lock(folder / ".lock", refuse))
