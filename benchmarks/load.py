"""Row `load`: a model directory of the published size, from disk to ready weights."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.measure import BenchmarkRow, in_new_process
from benchmarks.random_model import full_size_model

_REPEATS = 3
_PAGE = 4096


def load_row(device: str) -> BenchmarkRow:
    """Time `load_model` and the first touch of every weight; the limit is a plain read.

    Both find the file in the page cache: the speed of the disk is not ours. A weight that is mapped
    and never touched would cost nothing, and be of no use, hence the touch.
    """
    directory = full_size_model()
    file = directory / "model.pth"
    limit = median(in_new_process(_read, file)[0] for _ in range(_REPEATS))
    results = [in_new_process(_load, directory, device) for _ in range(_REPEATS)]
    size, peak = file.stat().st_size, max(peak for _, peak in results)
    return BenchmarkRow(
        name="load",
        figure=median(seconds for seconds, _ in results),
        unit="s",
        limit=limit,
        peak_memory_gb=peak,
        workload=f"{size / 1e9:.2f} GB bf16, every page touched; peak is {peak * 1e9 / size:.2f} x"
        " the file; limit: the same bytes copied from the page cache",
    )


def _load(directory: Path, device: str) -> float:
    import torch

    from fish_speech.models.text2semantic import load_model

    start = perf_counter()
    model = load_model(directory, device)
    for weight in model.parameters():
        weight.detach().flatten().view(torch.uint8)[::_PAGE].sum().item()
    return perf_counter() - start


def _read(file: Path) -> float:
    start = perf_counter()
    buffer = memoryview(bytearray(file.stat().st_size))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            buffer = buffer[count:]
    return perf_counter() - start
