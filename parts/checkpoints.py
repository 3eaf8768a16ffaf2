"""Checkpoints: written so that a crash at any moment leaves one that can be read, and read so that a file
from elsewhere can't run code.

    checkpoint.pt             weights, their average, optimizer, regime, groups, codec, words, settings
    checkpoint-previous.pt    the one before, in case the newest is damaged
    model.safetensors         of an export: the average, codec, words, settings; can be used, not continued

Errors are UserErrors that name the folder, the file and the fix.

Public: VERSION, CHECKPOINTS, EXPORTED, load_checkpoint, has_checkpoint, save_checkpoint, save_run, export,
load_weights, not_written, save_half, load_frozen.
"""
from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from parts.config import Config, load_config, save_config
from parts.errors import UserError, quoted
from parts.files import write_bytes

# Raised when saved weights or settings change their meaning.
VERSION = 4
CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")  # newest first
EXPORTED = "model.safetensors"


def has_checkpoint(folder: Path) -> bool:
    """Is there one that load_checkpoint could try?"""
    return any((folder / name).is_file() for name in (*CHECKPOINTS, EXPORTED))


def load_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(settings, checkpoint) of a run folder, or of the checkpoint before it, with a warning, where the
    newest can't be read; or of an export. Weights-only loading, so a file from elsewhere can't run code."""
    fields, failed = load_config(folder), []
    exported = (folder / EXPORTED).is_file() and not any((folder / name).exists() for name in CHECKPOINTS)
    for name in (EXPORTED,) if exported else CHECKPOINTS:
        try:
            checkpoint = _read_exported(folder / name) if exported else _read_pickled(folder / name)
            checkpoint = {"config": {}, **checkpoint, "step": int(checkpoint["step"])}
            _check_parts(checkpoint)
        except FileNotFoundError:
            continue
        except Exception as e:  # zip, pickle and key errors all mean the same to the user
            first_line = (str(e).splitlines() or [""])[0]
            failed.append(f"{name}: {type(e).__name__}: {first_line[:120]}")
            continue
        _check_same_run(folder, name, fields, checkpoint)
        if name == CHECKPOINTS[1]:
            what = f"is damaged ({failed[0]})" if failed else "is missing"
            print(f"warning: {folder / CHECKPOINTS[0]} {what}; going on from {name}, "
                  f"step {checkpoint['step']}", file=sys.stderr)
        return fields, checkpoint
    if failed:
        raise UserError(f"{folder}: checkpoint can't be read ({'; '.join(failed)})")
    raise UserError(f"{folder}: not a run folder (no checkpoint.pt)")


# Parts of a checkpoint: those that using a run needs, and those that going on needs besides.
USED = {"ema": dict, "codec": dict, "config": dict, "words": list}
TRAINED = {"model": dict, "projector": dict, "optimizer": list, "regime": dict, "structure": dict,
           "infonoise": dict, "seconds": float, "wall": float}


def _check_parts(checkpoint: dict) -> None:
    """KeyError for a part that is missing, TypeError for one that is something else, of this VERSION."""
    if checkpoint.get("version") != VERSION:
        return
    kinds = {**USED, **TRAINED} if "optimizer" in checkpoint else USED
    for name, kind in kinds.items():
        if not isinstance(checkpoint[name], (int, float) if kind is float else kind):
            raise TypeError(f"{name} is a {type(checkpoint[name]).__name__}")


def _read_pickled(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_exported(path: Path) -> dict:
    """The parts of a checkpoint that _save_exported wrote: tensors by name, the rest as JSON beside them."""
    from safetensors import safe_open

    parts: dict[str, dict] = {"ema": {}, "codec": {}}
    with safe_open(path, "pt") as file:
        about = file.metadata()
        for name in file.keys():
            part, _, own = name.partition(".")
            parts[part][own] = file.get_tensor(name)
    return {**parts, **{name: json.loads(about[name]) for name in ("version", "step", "words", "config")}}


def _save_exported(path: Path, ema: dict, codec: dict, **about) -> None:
    """ema, codec: tensors by name; about: what JSON can hold. Whole or not at all."""
    from safetensors.torch import save

    tensors = {}
    for part, state in (("ema", ema), ("codec", codec)):
        tensors |= {f"{part}.{name}": value.contiguous() for name, value in state.items()}
    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in about.items()}}
    write_bytes(path, save(tensors, metadata))


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


def save_run(run, log, timer) -> None:
    """All that a train.Training needs to go on as if it had never stopped."""
    log.sync()
    words = run.data.words.words if run.data.words is not None else []
    save_checkpoint(
        run.out / "checkpoint.pt", step=run.step, seconds=run.seconds(timer), wall=run.wall(timer),
        config=dataclasses.asdict(run.cfg), data=run.data.train_set.contents, words=words,
        codec=run.data.codec.state_dict(),
        regime=run.regime.state_dict(), structure=run.detector.state_dict(),
        infonoise=run.infonoise.state_dict() if run.infonoise else {},
        **run.networks.state_dict())


def export(run: Path, folder: Path) -> tuple[dict, dict]:
    """EMA weights in half precision, codec, vocabulary and settings: everything that using a run needs, as
    safetensors. -> load_checkpoint(run). UserError where the folder holds a run that can still be trained, or
    other things."""
    fields, checkpoint = load_checkpoint(run)
    ema = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    for state in (checkpoint["ema"], checkpoint["codec"], ema):    # half precision ends at 65,504
        refuse_not_finite(run, state)
    if has_checkpoint(folder):
        if "optimizer" in load_checkpoint(folder)[1]:
            raise UserError(f"{folder}: holds a run that can still be trained; export to another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no exported model; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    cfg = Config(**{**fields, "out": ""})                  # the path is of this machine
    _save_exported(folder / EXPORTED, ema, checkpoint["codec"], version=VERSION, step=checkpoint["step"],
                   words=checkpoint["words"], config=dataclasses.asdict(cfg))
    for name in CHECKPOINTS:                               # of an export by earlier code that stood here
        (folder / name).unlink(missing_ok=True)
    save_config(folder, cfg)
    return fields, checkpoint


def not_written(path: Path, why: str) -> UserError:
    """What to say where a run's file can't be written."""
    return UserError(f"{path}: can't be written ({why}); the last checkpoint is intact: make room, then "
                     f"python train.py --resume {quoted(path.parent)}")


def refuse_not_finite(path: str | Path, state: dict) -> None:
    """UserError where a weight is NaN or infinite: all that is made with it would be."""
    for name, weight in state.items():
        if torch.is_tensor(weight) and not bool(weight.isfinite().all()):
            raise UserError(f"{path}: its weights are not finite ({name}); use an earlier checkpoint, or "
                            "train anew")


def load_weights(path: str | Path, module: nn.Module, state: dict, **how) -> None:
    """load_state_dict whose refusal is one line: which weights are missing, unknown, of another shape or not
    finite."""
    refuse_not_finite(path, state)
    try:
        module.load_state_dict(state, **how)
    except RuntimeError as e:
        detail = "; ".join(line.strip() for line in str(e).splitlines()[1:3])
        raise UserError(f"{path}: its weights are those of another model or version "
                        f"({detail[:160]})") from None


# --- small weights that the project ships -------------------------------------------------------------------

def save_half(module: nn.Module, path: Path) -> None:
    """Weights of a module as safetensors in half precision; whole or not at all."""
    from safetensors.torch import save

    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    write_bytes(path, save({k: v.contiguous() for k, v in state.items()}))


def load_frozen(module: nn.Module, path: Path) -> nn.Module:
    """The module with the weights of save_half: float32, eval mode, no gradients."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path}: not a file of safetensors ({e})") from None
    load_weights(path, module, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return module.eval().requires_grad_(False)
