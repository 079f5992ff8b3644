"""One row of the benchmark, and new processes in which it is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fish_speech.resources import peak_memory

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache" / "bench"  # what is made once, for all runs


@dataclass(frozen=True)
class BenchmarkRow:
    """A figure beside the limit that the same run measured on the same machine.

    `figure` and `limit` are in `unit`: seconds (less is better) or a rate such as frames/s (more is
    better). `peak_memory_gb`, in 1e9 bytes, is the resident memory of the process that did the
    work, or what it allocated on a CUDA card.
    """

    name: str
    figure: float
    unit: str
    limit: float
    peak_memory_gb: float
    workload: str

    @property
    def fraction(self) -> float:
        """How much of the limit is reached; above 1 where the work avoids what the limit counts."""
        seconds = self.unit.split("/")[0] == "s"
        return self.limit / self.figure if seconds else self.figure / self.limit


def in_new_process(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Call a module-level function in a new interpreter: its result, and peak memory in GB.

    On Linux the peak of a process begins at that of the process that started it, so whatever calls
    this must stay small: heavy imports belong in `function`.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, args).result()


def _with_peak(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, float]:
    result = function(*args)
    torch = sys.modules.get("torch")
    on_cuda = torch is not None and torch.cuda.is_initialized()
    device = torch.device("cuda") if on_cuda else None
    return result, peak_memory(device, children=True) / 1e9
