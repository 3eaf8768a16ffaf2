"""Command lines: what every command of the project has in common.

A wrong flag ends in one line with the nearest right one, like any other error of a user (parts/errors.py); a
number is checked where it is typed, so NaN, infinities and integers too large for a generator get no further.

Public: Parser, Once, whole, number, new_file, new_folder, new_wav, new_json, new_weights, numbered.
"""
from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from pathlib import Path

from parts.errors import UserError

HIGHEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """description: the module's docstring, shown as it is written. Mistakes are UserErrors."""

    def __init__(self, description: str | None = None, **how):
        how.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **{**how, "allow_abbrev": False})

    def parse_args(self, args=None, namespace=None):
        typed = list(sys.argv[1:] if args is None else args)
        for word in itertools.takewhile(lambda word: word != "--", typed):
            if word.startswith("--") and word.partition("=")[0] not in self.flags():
                self.error(f"unrecognized arguments: {word}")      # before it is missed under its right name
        return super().parse_args(typed, namespace)

    def error(self, message: str):
        # "argument --seed: invalid int value: 'x'" -> "--seed: invalid int value: 'x'"
        message = re.sub(r"^argument (\S+): (.*: must be)", r"\1 \2", message).removeprefix("argument ")
        if message.endswith("expected one argument"):
            message += f"; a value that begins with - is written {message.partition(':')[0]}=-VALUE"
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown[1].partition("=")[0]
            if not flag.startswith("-"):
                raise UserError(f"{flag}: one argument too many; a text of several words needs quotes")
            near = difflib.get_close_matches(flag, self.flags(), 1)
            hint = f"did you mean {near[0]}?" if near else "all of them: --help"
            message = f"{flag}: no such flag; {hint}"
            if flag in self.flags():
                message = f"{flag}: not a flag of this command, but of another; its own: --help"
        raise UserError(message)

    def actions(self) -> list[argparse.Action]:
        """All arguments, those of subcommands too."""
        found = list(self._actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    found += command.actions()
        return found

    def flags(self) -> list[str]:
        return [flag for action in self.actions() for flag in action.option_strings]


class Once(argparse.Action):
    """Of a flag whose first value nobody means to replace by a second."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string}: given twice; a command takes one")
        setattr(namespace, self.dest, values)


def whole(low: int = 0, high: int = HIGHEST):
    """An argparse type: an integer from low to high."""
    return _between(int, low, high, "a whole number")


def number(low: float, high: float):
    """An argparse type: a float from low to high."""
    return _between(float, low, high, "a number")


def new_file(text: str) -> Path:
    """An argparse type: a file to write. Asked before the work, whose result would find no place."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text[:200]}: must be a file, and this is a folder")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text[:200]}: must be a file that can be written, in {above} "
                                         "nothing can")
    return path


def new_folder(text: str) -> Path:
    """An argparse type: a folder to write to, which may be there."""
    path = Path(text)
    if not text.strip() or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text[:200] or 'empty'}: must be a folder")
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text[:200]}: must be a folder that can be made, in {above} "
                                         "nothing can")
    return path


def new_wav(text: str) -> Path:
    """An argparse type: a .wav file to write."""
    return _named(text, ".wav")


def new_json(text: str) -> Path:
    """An argparse type: a .json file to write."""
    return _named(text, ".json")


def new_weights(text: str) -> Path:
    """An argparse type: a .safetensors file to write."""
    return _named(text, ".safetensors")


def numbered(out: Path, n: int) -> list[Path]:
    """The files of n results: `out` itself, or out-0, out-1 ... beside it. UserError where one can't be
    written."""
    if n == 1:
        return [out]
    paths = [out.with_stem(f"{out.stem}-{k}") for k in range(n)]
    folder = next((path for path in paths if path.is_dir()), None)
    if folder:
        raise UserError(f"--out {out}: {folder} must be a file, and this is a folder")
    return paths


def _named(text: str, suffix: str) -> Path:
    if Path(text).suffix.lower() != suffix:
        raise argparse.ArgumentTypeError(f"{text[:200]}: must be named NAME{suffix}")
    return new_file(text)


def _between(kind, low, high, name: str):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:              # NaN is in no interval
            open_ended = high == HIGHEST and (value is None or value < low)
            limits = f"of at least {low}" if open_ended else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be {name} {limits}")
        return value
    return parse
