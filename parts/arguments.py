"""Command lines: what every command of the project has in common.

A wrong flag ends in one line with the nearest right one, like any other error of a user (parts/errors.py); a
number is checked where it is typed, so NaN, infinities and integers too large for a generator get no further.

Public: Parser, whole, number, new_file.
"""
from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path

from parts.errors import UserError

HIGHEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """description: the module's docstring, shown as it is written. Mistakes are UserErrors."""

    def __init__(self, description: str | None = None, **how):
        how.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **{**how, "allow_abbrev": False})

    def error(self, message: str):
        # "argument --seed: invalid int value: 'x'" -> "--seed: invalid int value: 'x'"
        message = re.sub(r"^argument (\S+): (.*: must be)", r"\1 \2", message).removeprefix("argument ")
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown[1].partition("=")[0]
            near = difflib.get_close_matches(flag, self.flags(), 1)
            hint = f"did you mean {near[0]}?" if near else "all of them: --help"
            message = f"{flag}: no such flag; {hint}"
        raise UserError(message)

    def flags(self) -> list[str]:
        """All flags, those of subcommands too."""
        found = []
        for action in self._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    found += command.flags()
        return found


def whole(low: int = 0, high: int = HIGHEST):
    """An argparse type: an integer from low to high."""
    return _between(int, low, high, "a whole number")


def number(low: float, high: float):
    """An argparse type: a float from low to high."""
    return _between(float, low, high, "a number")


def new_file(text: str) -> Path:
    """An argparse type: a file to write. Asked before the work, whose result would find no place."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text[:200]}: must be a file, and this is a folder")
    return Path(text)


def _between(kind, low, high, name: str):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:              # NaN is in no interval
            limits = f"of at least {low}" if high == HIGHEST else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text[:40]}: must be {name} {limits}")
        return value
    return parse
