"""CPU cores, threads and memory: what this process may use, and what it does use.

A container (Docker, Kubernetes) or a batch system (SLURM) often allows less than the machine has,
and says so in control groups (cgroups).
"""

from __future__ import annotations

import os
import sys
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SMALL_MODEL = 100_000_000  # bytes of weights
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


@cache
def available_cores() -> int:
    """CPU cores in the process's affinity mask, at most the CPU quota of its cgroups."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    for group in _cgroups("cpu"):
        quota, period, *_ = *_words(group / "cpu.max"), "", ""
        if not quota:  # cgroups version 1
            quota, period = (
                "".join(_words(group / f"cpu.cfs_{what}_us")) for what in ("quota", "period")
            )
        if quota.isdecimal() and period.isdecimal():  # else "max" or "-1"
            count = min(count, max(1, ceil(int(quota) / int(period))))
    return count


def cgroup_memory_left() -> int | None:
    """Bytes of main memory that the process's cgroups leave it; None where they set no limit.

    The kernel's file cache counts as free: it is given up first.
    """
    left = []
    for group in _cgroups("memory"):
        for limit, used, total in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
        ):
            size, taken = "".join(_words(group / limit)), "".join(_words(group / used))
            # Version 1 says "no limit" as a number that is more than any machine has.
            if size.isdecimal() and taken.isdecimal() and int(size) < 1 << 60:
                stat = _words(group / "memory.stat")
                known = dict(zip(stat[::2], stat[1::2], strict=False))
                files = (known.get(f"{total}{kind}_file", "0") for kind in ("active", "inactive"))
                left.append(max(0, int(size) - int(taken) + sum(map(int, files))))
    return min(left, default=None)


def set_threads(count: int) -> None:
    """Set torch's CPU threads, at most one a core: more would wait for each other.

    Raises `ValueError` below 1.
    """
    import torch

    if count < 1:
        raise ValueError(f"--threads {count}: must be at least 1")
    torch.set_num_threads(min(count, available_cores()))


def limit_threads() -> None:
    """At most one thread a core: a container may allow fewer cores than torch counts."""
    import torch

    if torch.get_num_threads() > available_cores():
        set_threads(available_cores())


def set_threads_for_model(weights: Path) -> None:
    """One thread for a small model, where more would only wait for each other; else one a core."""
    limit_threads()
    if weights.stat().st_size < _SMALL_MODEL:
        set_threads(1)


def tune_malloc() -> None:
    """Let malloc keep freed memory, for the whole process; glibc only.

    Otherwise large blocks go back to the kernel, which hands them out again page by page, zeroed:
    a tenth of the time of a training step, or of decoding, on a CPU.
    """
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    if library := _glibc():
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def trim_malloc() -> None:
    """Return freed memory to the kernel; glibc only."""
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> Any:
    import ctypes

    library = ctypes.CDLL(None) if os.name == "posix" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def peak_memory(device: torch.device | None, *, children: bool = False) -> int:
    """Peak memory in bytes: allocated on a CUDA card, else (None is a CPU) resident for the
    process, or for one of its ended `children` where that was more."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)[: 1 + children]
    return max(resource.getrusage(each).ru_maxrss for each in who) * unit


def free_memory(device: torch.device) -> int:
    """Bytes still available on a device (for the CPU: of main memory)."""
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import psutil

    available, allowed = psutil.virtual_memory().available, cgroup_memory_left()
    return available if allowed is None else min(available, allowed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a device or an allocator means out of memory."""
    import torch

    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in signs
    )


def _cgroups(controller: str) -> list[Path]:
    """The folders of the cgroups that may limit the process: its own and all above it."""
    found = []
    for line in _lines(_CGROUP_MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUP_ROOT / controllers  # of version 2 there is one tree, without a name
        own = root / path.lstrip("/")
        # In a container the path may be the host's; what there is then is its own root.
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return found


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
