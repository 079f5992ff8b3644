"""Threads that run one compiled function together, each a part of every step."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from fish_speech.models.text2semantic.decode.cpu_kernels import ABORTED, SYNC_SIZE

_MIN_BYTES = 1 << 21  # of work: for less, waking another thread takes longer


class Team:
    """`size` threads, of which the one that calls `run` is the first; begun when first needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self._lock = threading.Lock()
        self._tasks: list[SimpleQueue] = []
        self._failure: BaseException | None = None

    def run(self, function: Callable, *args: Any) -> None:
        """Call a compiled `function(rank, size, sync, *args)` in every thread.

        It has to release the GIL, and to end with `barrier`.
        """
        if self.size == 1:  # which any number of callers may be at once
            function(0, 1, self._sync, *args)
            return
        with self._lock:
            self._begin()
            sync = self._sync
            try:
                for tasks in self._tasks:
                    tasks.put((function, sync, args))
                function(0, self.size, sync, *args)
                if sync[ABORTED]:
                    raise self._failure
            except BaseException:  # Ctrl+C before all were called: nobody waits for the others
                sync[ABORTED] = 1
                self._sync = np.zeros(SYNC_SIZE, np.int64)
                raise

    def _begin(self) -> None:
        while len(self._tasks) < self.size - 1:
            tasks = SimpleQueue()
            rank = len(self._tasks) + 1
            threading.Thread(target=self._serve, args=(rank, tasks), daemon=True).start()
            self._tasks.append(tasks)

    def _serve(self, rank: int, tasks: SimpleQueue) -> None:
        while True:
            function, sync, args = tasks.get()
            try:
                function(rank, self.size, sync, *args)
            except BaseException as error:  # no memory, say; the caller raises it
                self._failure = error
                sync[ABORTED] = 1
            del function, sync, args  # a model's weights, which may be gone before the next task


_alone = Team(1)
_teams: dict[tuple[int, int], Team] = {}  # of a process, which a fork leaves without its threads


def team_for(work: int) -> Team:
    """The threads for what reads `work` bytes: this one alone, or as many as torch would use."""
    size = torch.get_num_threads()
    if work < _MIN_BYTES or size == 1:
        return _alone
    key = os.getpid(), size
    return _teams.get(key) or _teams.setdefault(key, Team(size))  # one, for callers at once too
