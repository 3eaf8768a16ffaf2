"""Files that are whole or absent, JSON that every program reads, and locks between processes.

Public: write_text, write_bytes, reading, read_json, to_json, file_lock.
"""
from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
from pathlib import Path

import filelock

from parts.errors import UserError


def write_text(path: Path, text: str) -> None:
    """write_bytes of a text in UTF-8. Of a file name in no encoding the strange bytes are written as
    escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and its folder where there is none. A reader, or a crash, finds the old file or the new
    one and never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # there may be another writer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):                 # of a read-only disk: there is nothing to remove
            temporary.unlink()
        raise cannot_write(path, e) from None


def cannot_write(path: str | Path, e: OSError) -> UserError:
    """What to say where the system refuses a file."""
    full = "; make room there" if e.errno == errno.ENOSPC else ""
    return UserError(f"{path}: can't be written ({e.strerror}){full}")


@contextlib.contextmanager
def reading(path: str | Path, fix: str = "bring back the original, or make it again"):
    """A block that does nothing but read and take apart what the file `path` holds: what it stumbles over is
    the file's fault, and ends in a UserError that names it and the fix."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as e:
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"
        raise UserError(f"{path}: damaged, or not a file of this project ({why}); {fix}") from None


def read_json(path: Path, **how) -> dict:
    """A file that holds one JSON object. UserError (see `reading`) where it holds anything else."""
    with reading(path, **how):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"{type(found).__name__}, not an object")
    return found


def to_json(x, indent: int | None = None) -> str:
    """Strict JSON (RFC 8259): NaN and infinities, which it does not know, become null."""
    def known(value):
        if isinstance(value, dict):
            return {name: known(of) for name, of in value.items()}
        if isinstance(value, (list, tuple)):
            return [known(of) for of in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(known(x), indent=indent, allow_nan=False)


@contextlib.contextmanager
def file_lock(path: Path, refuse: str = ""):
    """One process at a time between here and the end of the block, by a lock on the file `path`, which is
    made where it is missing; the others wait, or get the UserError `refuse`. The lock is the system's and
    ends with its process: a killed one is in nobody's way."""
    lock = filelock.FileLock(path, timeout=0 if refuse else -1)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(refuse) from None
    try:
        yield
    finally:
        lock.release()
