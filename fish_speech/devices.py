"""Devices: which one, in which number format, what it supports, and transfers to and from it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
_MIN_TRITON_CAPABILITY = (7, 0)  # compute capability of a CUDA card
_MIN_FLASH_CAPABILITY = (8, 0)


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
        return torch.bfloat16 if wanted and has_native_bf16(device) else torch.float32
    if name == "bf16" and device.type == "mps":
        raise ValueError("--precision bf16: MPS computes this model in fp32 only; use fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def resolve_device_and_dtype(
    device: str, precision: str, quantize: str | None = None
) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the dtype unless `precision` is `auto`, from these flags.

    Raises `ValueError` for a combination that this machine can't do.
    """
    resolved = resolve_device(device)
    if quantize and resolved.type != "cpu":
        raise ValueError(f"--quantize {quantize} is for the CPU, not for {resolved.type}")
    return resolved, None if precision == "auto" else resolve_precision(precision, resolved)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16 matrices.

    Elsewhere they are emulated, and slower than fp32.
    """
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):  # the card that is asked
            return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "bf16")  # the last on ARM
    return device.type == "cpu" and _has_any_instruction(*names)


def has_native_int8(device: torch.device) -> bool:
    """Whether a CPU has them for int8; without them the sums are not exact either."""
    return device.type == "cpu" and _has_any_instruction("avx512_vnni", "avx_vnni", "amx_int8")


def _has_any_instruction(*instructions: str) -> bool:
    """Whether the CPU has one of these, and torch the library that uses them."""
    import torch

    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(map(has.get, instructions))


@cache
def supports_gqa(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether fused attention supports grouped-query attention (heads that share keys).

    On CUDA only flash attention does, which takes no mask and needs 16 bits and a card from Ampere
    on. torch's fallback for shared keys keeps the whole matrix of attention weights.
    """
    import torch

    if device.type != "cuda":
        return True
    recent = torch.cuda.get_device_capability(device) >= _MIN_FLASH_CAPABILITY
    return recent and dtype.itemsize == 2 and not masked


@cache
def triton_unavailable_reason(device: torch.device) -> str | None:
    """Why Triton can't compile kernels for a device, in a line; None where it can."""
    import torch

    if device.type != "cuda":
        return f"Triton is not for {device.type}"
    if torch.version.hip:
        return "these kernels are for NVIDIA's cards"
    if torch.cuda.get_device_capability(device) < _MIN_TRITON_CAPABILITY:
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


def to_device_async(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device, without waiting for a CUDA card."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host_async(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying values to the CPU; the function returned waits for them and returns them.

    It waits only until the copy is done, not for later work of a CUDA card.
    """
    if values.device.type != "cuda":
        return values.clone
    import torch

    copy = torch.empty_like(values, device="cpu", pin_memory=True)
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def read() -> torch.Tensor:
        copied.synchronize()
        return copy

    return read


def seed_rng(seed: int, device: torch.device) -> None:
    """Seed the random number generators of the CPU and of a device.

    `torch.manual_seed` seeds every kind of device, and for one that isn't there keeps a stack
    trace: a millisecond, and ten kilobytes, in each training step.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).manual_seed(seed)
