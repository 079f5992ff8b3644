"""What the machine can do at best, measured in the same run as the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int]  # rows, in, out: [rows, in] times [in, out]

_STREAM_BYTES = 1 << 30  # far more than any cache
_MAX_ROWS = 8192  # more are no faster, and take longer
_REPEATS = 5
_MAX_SECONDS = 20.0  # of repeating, for what emulated number formats make slow


def time_calls(work: Callable[[], object], device: str, repeats: int = _REPEATS) -> list[float]:
    """Seconds of each call of `work` until the device has finished, after one warm-up call."""
    times: list[float] = []
    while len(times) <= repeats and (len(times) < 2 or sum(times) < _MAX_SECONDS):
        start = perf_counter()
        work()
        synchronize(device)
        times.append(perf_counter() - start)
    return times[1:]


def synchronize(device: str) -> None:
    """Return when the device has done all that was asked of it; a CPU always has."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: str) -> float:
    """Bytes a second that a sum over a gigabyte reads, at its best."""
    import torch

    stream = torch.ones(_STREAM_BYTES // 4, device=device)
    return _STREAM_BYTES / min(time_calls(stream.sum, device))


def matrix_rate(shapes: Iterable[Shape], dtype: str, device: str) -> float:
    """FLOP/s of the fastest of a workload's matrix products: what all of them might reach."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    best = 0.0
    for rows, width, out in sorted({(min(rows, _MAX_ROWS), *rest) for rows, *rest in shapes}):
        x = torch.randn(rows, width, device=device).to(kind)
        weight = torch.randn(out, width, device=device).to(kind)
        times = time_calls(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device)
        best = max(best, 2 * rows * width * out / min(times))
    return best
