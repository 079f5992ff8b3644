"""Row `startup`: the time until a script answers `--help`."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from time import perf_counter

from benchmarks.measure import REPOSITORY, BenchmarkRow, in_new_process

SCRIPTS = ("prepare_dataset.py", "finetune_tts.py", "cli_tts.py")
_REPEATS = 5


def startup_row(device: str) -> BenchmarkRow:
    """The slowest of the three scripts; the limit is the bare start of the interpreter."""
    seconds, peak = in_new_process(_help_seconds)
    limit, _ = in_new_process(_median_seconds, ["-c", "pass"])
    return BenchmarkRow(
        name="startup",
        figure=max(seconds.values()),
        unit="s",
        limit=limit,
        peak_memory_gb=peak,
        workload="--help: "
        + ", ".join(f"{script} {figure:.2f} s" for script, figure in seconds.items())
        + "; limit: python -c pass",
    )


def _help_seconds() -> dict[str, float]:
    return {script: _median_seconds([script, "--help"]) for script in SCRIPTS}


def _median_seconds(arguments: list[str]) -> float:
    return median(_seconds(arguments) for _ in range(_REPEATS))


def _seconds(arguments: list[str]) -> float:
    start = perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"'{' '.join(arguments)}' ended with {result.returncode}: {reason}")
    return perf_counter() - start
