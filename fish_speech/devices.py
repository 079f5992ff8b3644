"""Which device and which number format a piece of work runs in."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from fish_speech import resources

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
_SMALL_MODEL = 100_000_000  # bytes of weights
_LEAST_CAPABILITY = (7, 0)  # of a CUDA card, for Triton
_FLASH_CAPABILITY = (8, 0)


def resolve_device(name: str = "auto", cards: int = 1) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU (Apple's MPS only when asked for).

    Raises `ValueError` where the device, or so many `cards`, aren't there. It names flags to give,
    not to leave out: a run that goes on remembers those of the machine that it was on.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    kind, _, index = name.partition(":")
    if kind not in count or (index and not index.isdecimal()):
        raise ValueError(f"--device {name}: unknown; use one of {', '.join(DEVICES)}")
    if int(index or 0) >= count[kind]:
        there = f"{count[kind]} of this kind" if count[kind] else "none"
        raise ValueError(
            f"--device {name}: this machine has {there}; --device auto takes what there is"
        )
    if kind == "cuda" and not index and cards > count[kind]:
        raise ValueError(f"--devices {cards}: this machine has fewer; give --devices {count[kind]}")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The dtype of the weights: `auto` is bf16 on a CUDA card that has it, else fp32.

    For `training`, where most of the work is large products with a frozen base, `auto` is bf16 on a
    CPU too that multiplies it natively.

    Raises `ValueError` for a combination that would end in a dtype error later.
    """
    import torch

    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: unknown; use one of {', '.join(PRECISIONS)}")
    if name == "auto":
        wanted = training or device.type != "cpu"
        return torch.bfloat16 if wanted and multiplies_bf16(device) else torch.float32
    if name == "bf16" and device.type == "mps":
        raise ValueError("--precision bf16: MPS computes this model in fp32 only; use fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 matrices run on instructions made for them.

    Elsewhere they are emulated, and slower than fp32.
    """
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):  # the card that is asked
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _has_any("avx512_bf16", "amx_bf16", "bf16")  # the last on ARM


def multiplies_int8(device: torch.device) -> bool:
    """The same of int8, whose sums are not exact either without such instructions."""
    return device.type == "cpu" and _has_any("avx512_vnni", "avx_vnni", "amx_int8")


def _has_any(*instructions: str) -> bool:
    """Whether the CPU has one of these, and torch the library that uses them."""
    import torch

    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(map(has.get, instructions))


@cache
def shares_keys(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether fused attention takes keys that several heads share.

    On CUDA flash attention alone does, which has no mask and is for 16 bits and cards from Ampere
    on. What torch takes in its place for such keys keeps a weight of every pair of columns.
    """
    import torch

    if device.type != "cuda":
        return True
    recent = torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
    return recent and dtype.itemsize == 2 and not masked


@cache
def compile_problem(device: torch.device) -> str | None:
    """Why Triton can't compile kernels for a device, in a line; None where it can."""
    import torch

    if device.type != "cuda":
        return f"Triton is not for {device.type}"
    if torch.version.hip:
        return "these kernels are for NVIDIA's cards"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "the card is too old for Triton"
    try:
        from triton.runtime import driver

        driver.active  # noqa: B018 (builds what Triton needs in C)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        return (
            f"{reason}; on Linux Triton needs a C compiler and Python's headers: gcc, python3-dev"
        )
    return None


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; a CUDA card is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def read_later(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Values on the CPU, when they are asked for: a CUDA card is waited for only then, and only
    until it has made them."""
    if values.device.type != "cuda":
        return values.clone
    import torch

    copy = torch.empty_like(values, device="cpu", pin_memory=True)
    copy.copy_(values, non_blocking=True)
    made = torch.cuda.Event()
    made.record(torch.cuda.current_stream(values.device))

    def read() -> torch.Tensor:
        made.synchronize()
        return copy

    return read


def seed_draws(seed: int, device: torch.device) -> None:
    """What is drawn on the CPU and on a device from here on follows from a seed.

    `torch.manual_seed` asks every kind of device, and for one that isn't there keeps a stack trace:
    a millisecond, and ten kilobytes, of each step.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).manual_seed(seed)


def set_threads(count: int) -> None:
    """Threads that one operation may use on the CPU, as far as there are cores for them: with more
    they wait for each other. Raises `ValueError` below 1."""
    import torch

    if count < 1:
        raise ValueError(f"--threads {count}: must be at least 1")
    torch.set_num_threads(min(count, resources.cores()))


def limit_threads() -> None:
    """No more threads than cores, where a container allows fewer of them than torch counts."""
    import torch

    if torch.get_num_threads() > resources.cores():
        set_threads(resources.cores())


def suit_threads(weights: Path) -> None:
    """One thread for a model of so few bytes that more would only wait for each other; for others
    as many as there are cores."""
    limit_threads()
    if weights.stat().st_size < _SMALL_MODEL:
        set_threads(1)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the whole process; does nothing but on glibc.

    Large blocks otherwise go back to the kernel, which gives them again page by page, zeroed: a
    tenth of a training step or of decoding on a CPU.
    """
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    if library := _glibc():
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Return to the kernel what is free by now, where the C library is glibc."""
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> Any:
    import ctypes

    library = ctypes.CDLL(None) if os.name == "posix" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def peak_memory(device: torch.device | None, *, children: bool = False) -> int:
    """Bytes: the most that was allocated on a CUDA card, else (None is a CPU) the most resident
    memory that the process has had; or one of its ended `children`, where that was more."""
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
    """Bytes that can still be had on a device (for the CPU: of main memory)."""
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import psutil

    available, allowed = psutil.virtual_memory().available, resources.memory()
    return available if allowed is None else min(available, allowed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a device or of the allocator means that memory ran out."""
    import torch

    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in signs
    )
