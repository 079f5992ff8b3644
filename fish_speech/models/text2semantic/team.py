"""Threads that go through one compiled function together, each doing its part of every step."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from fish_speech.models.text2semantic.column import OVER, SYNC_SIZE

_WORTH_SHARING = 1 << 21  # bytes; of fewer, another thread has only just woken up


class Team:
    """`size` threads, of which the one that calls `run` is the first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self._lock = threading.Lock()
        self._tasks: list[SimpleQueue] = [SimpleQueue() for _ in range(size - 1)]
        for place, tasks in enumerate(self._tasks, start=1):
            threading.Thread(target=_serve, args=(place, size, tasks), daemon=True).start()

    def run(self, function: Callable, *args: Any) -> None:
        """Call a compiled `function(place, size, sync, *args)` in every thread.

        It has to release the GIL, and to end with `meet`.
        """
        with self._lock:
            sync = self._sync
            try:
                for tasks in self._tasks:
                    tasks.put((function, sync, args))
                function(0, self.size, sync, *args)
                if sync[OVER]:
                    raise MemoryError("no memory for a frame of speech")
            except BaseException:  # Ctrl+C before all were called: nobody waits for the others
                sync[OVER] = 1
                self._sync = np.zeros(SYNC_SIZE, np.int64)
                raise


def _serve(place: int, size: int, tasks: SimpleQueue) -> None:
    while True:
        function, sync, args = tasks.get()
        try:
            function(place, size, sync, *args)
        except BaseException:  # of memory there is none; the caller says so
            sync[OVER] = 1
        del function, sync, args  # a model's weights, which may be gone before the next task


_alone = Team(1)
_teams: dict[tuple[int, int], Team] = {}  # of a process, which a fork leaves without its threads


def team_for(work: int) -> Team:
    """Who does what reads `work` bytes: this thread alone, or as many as torch would take."""
    if work < _WORTH_SHARING:
        return _alone
    key = os.getpid(), torch.get_num_threads()
    if key not in _teams:
        _teams[key] = Team(key[1])
    return _teams[key]
