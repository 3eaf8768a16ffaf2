"""Checkpoints: written so that a crash at any moment leaves one that can be read, and read so that a file
from elsewhere can't run code.

    checkpoint.pt             weights, their average, optimizer, regime, groups, codec, words, settings
    checkpoint-previous.pt    the one before, in case the newest is damaged

Errors are UserErrors that name the folder, the file and the fix.

Public: VERSION, CHECKPOINTS, load_checkpoint, has_checkpoint, save_checkpoint, export, load_weights,
not_written,
save_half, load_frozen.
"""
from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from torch import nn

from parts.config import Config, load_config, save_config
from parts.errors import UserError

# Raised when saved weights or settings change their meaning.
VERSION = 4
CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")  # newest first


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


# --- small weights that the project ships -------------------------------------------------------------------

def save_half(module: nn.Module, path: Path) -> None:
    """Weights of a module as safetensors in half precision; makes the folder where there is none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}, path)


def load_frozen(module: nn.Module, path: Path) -> nn.Module:
    """The module with the weights of save_half: float32, eval mode, no gradients."""
    from safetensors.torch import load_file

    state = load_file(path)
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return module.eval().requires_grad_(False)
