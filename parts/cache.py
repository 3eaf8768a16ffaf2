"""Arrays on disk that are filled once, by several processes, and continued where they stopped.

Everything that is slow to make and can be made again (rendered clips, decoded recordings, latents, teacher
features) is an array in a cache folder, named by a hash of all that it depends on. An array is made in chunks
of items; a byte a chunk says which are done, so an interrupted run loses no more than the chunks that it was
working on.

    fn(indices, *args) --fill_array--> NAME.npy   rows of all items, returned as a read-only memory map
                                       NAME.done  one byte a chunk: 1 where it is filled
                                       NAME.lock  so that two runs do not fill one array at once

Workers are spawned, so this module imports no torch: it would cost each of them seconds.

Public: cache_dir, digest, cores, can_spawn, start_worker, parallel_map, chunk_of, fill_array.
"""
from __future__ import annotations

import hashlib
import multiprocessing as mp
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts.errors import UserError
from parts.files import file_lock


def cache_dir() -> Path:
    """Folder of everything that can be made again. Delete it whenever you like; STAGE_AUDIO_CACHE moves it
    elsewhere."""
    folder = Path(os.path.expanduser(os.environ.get("STAGE_AUDIO_CACHE") or "~/.cache/stage-audio"))
    if folder.parts[:1] == ("~",):  # a user without a home
        folder = Path(tempfile.gettempdir()) / f"stage-audio-{os.getuid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()         # asks the disk: it may be read-only, or full
    except OSError as e:
        raise UserError(f"cache folder {folder}: can't be written ({e.strerror}); set STAGE_AUDIO_CACHE to a "
                        "folder that can") from None
    return folder


def digest(*parts) -> str:
    """Short stable hash of any printable parts; the name of a cache entry."""
    text = "|".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]  # of file names in no UTF-8


# --- worker processes -----------------------------------------------------------------------------------

def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this one. A killed parent can't tell its workers;
    without this they would finish their jobs and then wait for ever."""
    mp.connection.wait([mp.parent_process().sentinel])
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def start_worker() -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


GUARD = ("A script of your own that is not a module must start its work under `if __name__ == '__main__':`, "
         "since worker processes read it too")


def can_spawn() -> bool:
    """Can worker processes be started? They import the main module: not where it came from a pipe."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return file is None or getattr(main, "__spec__", None) is not None or Path(file).is_file()


def _refuse_without_guard() -> None:
    """End a worker that reads its parent's script and is about to do the parent's work (which would wait for
    the parent's lock for ever); the parent says why."""
    if getattr(mp.current_process(), "_inheriting", False):
        os._exit(2)


def parallel_map(fn, jobs, args=(), workers: int | None = None, ahead: int = 2, apart: bool = False):
    """Yield (job, fn(job, *args)) as they finish, in worker processes (None: one a core; 0: in this one). fn
    must be top-level. `ahead` jobs a worker are handed out at a time; with 1, none is begun after Ctrl-C. A
    single job is done in this process, unless it must be `apart`."""
    if workers is None:
        workers = min(61, cores())  # Windows allows 61 handles
    if workers == 0 or len(jobs) <= (0 if apart else 1) or not can_spawn():
        for job in jobs:
            yield job, fn(job, *args)
        return

    # 'spawn', not 'fork': forking a process whose torch threads have run can deadlock in the child.
    pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), initializer=start_worker)
    try:
        job_of = {}  # future -> job
        todo = list(jobs)[::-1]
        while todo or job_of:
            while todo and len(job_of) < ahead * workers:
                job = todo.pop()
                job_of[pool.submit(fn, job, *args)] = job
            finished = wait(list(job_of), return_when=FIRST_COMPLETED).done
            future = next(iter(finished))
            yield job_of.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(f"a worker process ended before its work was done. {GUARD}; or there was too little "
                        "memory: --workers 1") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- arrays ---------------------------------------------------------------------------------------------

def chunk_of(lengths) -> int:
    """How many clips of some lengths (samples at 16 kHz) are made at a time: 64, or fewer where they are
    long, since a chunk lies in memory: at most ten minutes, or one clip."""
    return int(np.clip(600 * 16_000 // max(lengths), 1, 64))


def fill_array(folder: Path, name: str, shape, dtype, fn, n: int, args=(), chunk: int = 64, workers=None,
               desc: str = "", where=None) -> np.ndarray:
    """Memory-map folder/name.npy, filling what is not yet done.

    fn(indices, *args) returns the rows of those items, concatenated along axis 0; item i owns row i, or the
    rows where[i]:where[i+1] when `where` (n+1 offsets) is given. `desc` is said on the progress bar. Returns
    a read-only memory map of `shape`. UserError where the disk has no room."""
    _refuse_without_guard()
    folder.mkdir(parents=True, exist_ok=True)
    where = np.arange(n + 1) if where is None else where
    path = folder / f"{name}.npy"
    flags_path = folder / f"{name}.done"
    n_chunks = -(-n // chunk)

    # Two runs that start together must not fill one cache at once.
    with file_lock(folder / f"{name}.lock"):
        flagged = flags_path.exists() and flags_path.stat().st_size == n_chunks
        begun = flagged and _is_whole(path, shape, dtype)
        if not begun:
            _create_array(path, shape, dtype, desc)
            flags_path.write_bytes(bytes(n_chunks))

        flags = np.memmap(flags_path, np.uint8, "r+")
        todo = [tuple(range(c * chunk, min(n, (c + 1) * chunk))) for c in np.flatnonzero(flags == 0)]
        if todo:
            # A chunk is flagged after its rows are on disk: a kill in between makes it again.
            rows = np.lib.format.open_memmap(path, "r+")
            done = n - sum(map(len, todo))
            bar = tqdm(total=n, initial=done, desc=desc, unit="clip", dynamic_ncols=True)
            for job, made in parallel_map(fn, todo, args, workers if len(todo) > 2 else 0):
                rows[where[job[0]] : where[job[-1] + 1]] = made
                rows.flush()
                flags[job[0] // chunk] = 1
                flags.flush()
                bar.update(len(job))
            bar.close()
    return np.load(path, mmap_mode="r")


def _is_whole(path: Path, shape, dtype) -> bool:
    """Is this an .npy file of that shape, all of which is on the disk? (Copies may have been cut short.)"""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == tuple(map(int, shape)) and array.dtype == dtype


def _create_array(path: Path, shape, dtype, desc: str) -> None:
    """An .npy file of zeros that takes its room on the disk now; it appears whole, under its final name."""
    folder = path.parent
    shape = tuple(map(int, shape))  # numpy integers would spoil the header
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free

    # The file is sparse at first: a disk that fills up under it would end this process without a word.
    if size > 0.95 * free:
        raise UserError(f"{folder}: {desc} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make "
                        "room, or set STAGE_AUDIO_CACHE to another disk")
    if size > 2e8:
        print(f"{desc}: writing {size / 1e9:.1f} GB to {folder}")

    # Take the room here, where a lack of it is an error and not a killed process.
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}")
    try:
        np.lib.format.open_memmap(temporary, "w+", dtype, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{folder}: {desc} can't be written ({e.strerror}); make room, or set "
                        "STAGE_AUDIO_CACHE to another disk") from None
    os.replace(temporary, path)
