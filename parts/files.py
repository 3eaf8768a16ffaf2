"""Text files that are whole or absent, and locks between processes.

Public: write_text, file_lock.
"""
from __future__ import annotations

import contextlib
import os
from pathlib import Path

from parts.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a text file, and its folder where there is none. A reader, or a crash, finds the old file or the new one
    and never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def file_lock(path: Path, refuse: str = ""):
    """One process at a time between here and the end of the block, by a lock on a folder or a file; the others wait,
    or get the UserError `refuse`. The lock is the system's and ends with its process: a killed one leaves none behind.
    (POSIX; elsewhere nothing is locked.)"""
    try:
        import fcntl
    except ImportError:
        yield
        return
    create = 0 if path.is_dir() else os.O_CREAT
    descriptor = os.open(path, os.O_RDONLY | create, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refuse else 0))
        yield
    except BlockingIOError:
        raise UserError(refuse) from None
    finally:
        os.close(descriptor)
