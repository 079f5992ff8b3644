"""Reading weight files and putting them into a module, strictly and without a second copy."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fish_speech.files import atomic_path
from fish_speech.resources import is_out_of_memory

_SHOWN = 5


def read_checkpoint(file: str | Path, *, mapped: bool = True) -> dict[str, Any]:
    """Read a file written by `torch.save`, tensors and plain values only: it is mapped into memory,
    and so stays in use as long as they are, unless it is not to be `mapped`.

    Raises `FileNotFoundError`, or `ValueError` that names the file where it is damaged, cut short,
    or holds anything else.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    file.open("rb").close()  # a file that may not be read is not a damaged one
    try:
        mapped = mapped and zipfile.is_zipfile(file)  # files of PyTorch before 1.6 can't be
        content = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a few flipped bytes raise almost anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{file}: damaged, cut short or no PyTorch weight file; get or make it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a state dict")
    return content


def check_sums(file: str | Path) -> None:
    """Raise `ValueError` where bytes of a file of `torch.save` changed since it was written: it
    holds checksums, which reading it does not look at."""
    if not zipfile.is_zipfile(file):
        return  # of PyTorch before 1.6, or cut short: whoever reads it sees that
    try:
        with zipfile.ZipFile(file) as records:
            damaged = records.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: damaged or cut short; get or make it again") from error
    if damaged:
        raise ValueError(f"{file}: damaged since it was written; get or make it again")


def save_tensors(content: dict[str, Any], file: str | Path) -> None:
    """Write a dict as `torch.save` does, atomically. Raises `OSError` where the disk is full."""
    with atomic_path(file) as temporary:
        try:
            # Given a path, torch writes its name into the file: the same content would differ.
            with temporary.open("wb") as stream:
                torch.save(content, stream)
        except RuntimeError as error:  # torch's writer does not say what went wrong
            free = shutil.disk_usage(temporary.parent).free
            raise OSError(
                f"{file}: could not be written, {free / 1e6:.0f} MB are free there ({error})"
            ) from error


def read_state_dict(file: str | Path, prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict in a file, out of its `{"state_dict": ...}` wrapper and without a prefix.

    Where any key begins with one of `prefixes`, only those keys count.
    """
    state = read_checkpoint(file)
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    strangers = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strangers or not state:
        raise ValueError(f"{file}: not a state dict ({strangers[:_SHOWN] or 'it is empty'})")
    return state


@contextmanager
def empty_modules() -> Iterator[None]:
    """Build modules on the meta device: no memory, and no initialisation to be thrown away."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    # On meta tensors `nn.init` and weight norm's norm import the compiler stack: a second and
    # 150 MB, for nothing.
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.norm_except_dim:
            return args[0][:, :1, :1]  # of dimension 0, weight norm's own choice
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def assign_strictly(module: nn.Module, state: dict[str, Tensor], file: str | Path) -> None:
    """Make the tensors of `state` the parameters of `module` (built on the meta device).

    Nothing is copied. Raises `ValueError` that names the file, the key and both shapes where one
    is missing, unknown or misshapen.
    """
    check_state(module, state, file)
    module.load_state_dict(state, strict=True, assign=True)


def check_state(module: nn.Module, state: dict[str, Tensor], file: str | Path) -> None:
    """Raise `ValueError` unless `state` has exactly the keys and shapes of `module`."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = [f"'{k}' {shape} is missing" for k, shape in wanted.items() if k not in state]
    for key, value in state.items():
        shape = tuple(value.shape)
        if key not in wanted:
            problems.append(f"'{key}' {shape} is not known to the model")
        elif wanted[key] != shape:
            problems.append(f"'{key}' has shape {shape}, but the config says {wanted[key]}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{file}: does not fit its config: {'; '.join(problems[:_SHOWN])}{more}")
