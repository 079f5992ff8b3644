"""What of the machine this process may use: a container (Docker, Kubernetes) or a batch system
(SLURM) often allows less than there is, and says so in its control groups."""

from __future__ import annotations

import os
from functools import cache
from math import ceil
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@cache
def cores() -> int:
    """CPU cores: those of the process's affinity, and no more than its groups' quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    for group in _groups("cpu"):
        quota, period, *_ = *_words(group / "cpu.max"), "", ""
        if not quota:  # version 1
            quota, period = (
                "".join(_words(group / f"cpu.cfs_{what}_us")) for what in ("quota", "period")
            )
        if quota.isdecimal() and period.isdecimal():  # else "max" or "-1"
            count = min(count, max(1, ceil(int(quota) / int(period))))
    return count


def memory() -> int | None:
    """Bytes of main memory that its groups leave it; None where they set no limit.

    Files that the kernel keeps in memory count as free: it gives them up first.
    """
    left = []
    for group in _groups("memory"):
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


def _groups(controller: str) -> list[Path]:
    """The folders of the process's groups that a controller may limit, its own and all above."""
    found = []
    for line in _lines(_MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controllers  # of version 2 there is one tree, without a name
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
