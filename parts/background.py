"""Work whose result nobody waits for: pictures of a run while it goes on.

Beside a GPU it is done in a process of its own, call after call in their order: drawing takes seconds, in
which the GPU would have nothing to do. On other devices the cores are busy anyway, and it is done at once.

Public: Background, at_once.
"""
from __future__ import annotations

import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor

from parts.cache import can_spawn, start_worker


def at_once(function, *args) -> None:
    """What a Background does where there is nothing to gain."""
    function(*args)


class Background:
    """`background(function, *args)`; function and arguments can be pickled. `finish()` waits for what is
    left. An error of a call is raised by a later one, or by `finish`."""

    def __init__(self, device: str):
        self.pool, self.calls = None, []
        if device.startswith("cuda") and can_spawn():
            # The process starts with its first call. It never touches the GPU.
            self.pool = ProcessPoolExecutor(1, mp.get_context("spawn"), initializer=start_worker)

    def __call__(self, function, *args) -> None:
        if self.pool is None:
            at_once(function, *args)
            return
        while self.calls and self.calls[0].done():
            self.calls.pop(0).result()
        self.calls.append(self.pool.submit(function, *args))

    def finish(self) -> None:
        while self.calls:
            self.calls.pop(0).result()
        if self.pool:
            self.pool.shutdown()
            self.pool = None
