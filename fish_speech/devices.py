"""Which device and which number format a piece of work runs in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU (Apple's MPS only when asked for).

    Raises `ValueError` where the device isn't there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in there:
        raise ValueError(f"--device {name}: unknown; use one of {', '.join(DEVICES)}")
    if not there[kind]:
        raise ValueError(f"--device {name}: this machine has none; leave the flag out, or use cpu")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights: `auto` is bf16 on a CUDA card that has it, else fp32.

    Raises `ValueError` for a combination that would end in a dtype error later.
    """
    import torch

    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: unknown; use one of {', '.join(PRECISIONS)}")
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if native else torch.float32
    if name == "bf16" and device.type == "mps":
        raise ValueError("--precision bf16: MPS computes this model in fp32 only; use fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def set_threads(count: int) -> None:
    """Threads that one operation may use on the CPU."""
    import torch

    torch.set_num_threads(count)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device (for the CPU: of main memory)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
