"""Which number format a device gets."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from fish_speech import resources
from fish_speech.devices import (
    compile_problem,
    resolve_device,
    resolve_precision,
    set_threads,
    shares_keys,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        ({"avx512_bf16": True, "avx512_f": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),  # ARM
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "avx2": True}, torch.float32),
        ({"bf16": False, "neon": True}, torch.float32),
    ],
)
def test_a_cpu_trains_in_bf16_only_where_it_is_not_emulated(monkeypatch, has, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert resolve_precision("auto", CPU, training=True) == chosen
    assert resolve_precision("auto", CPU) == torch.float32  # speaking
    assert resolve_precision("auto", torch.device("mps"), training=True) == torch.float32
    for training in (False, True):
        assert resolve_precision("fp32", CPU, training=training) == torch.float32
        assert resolve_precision("bf16", CPU, training=training) == torch.bfloat16


def test_a_cpu_without_a_library_of_bf16_products_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve_precision("auto", CPU, training=True) == torch.float32


def test_the_card_that_is_asked_for_is_the_one_whose_bf16_counts(monkeypatch):
    current = [0]

    class Selected:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Selected)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1] == 1)
    assert resolve_precision("auto", torch.device("cuda:1")) == torch.bfloat16
    assert resolve_precision("auto", torch.device("cuda:0")) == torch.float32


def test_what_can_not_be_is_refused():
    with pytest.raises(ValueError, match="--precision int3: unknown; use one of auto, fp32, bf16"):
        resolve_precision("int3", CPU)
    with pytest.raises(ValueError, match="MPS computes this model in fp32 only"):
        resolve_precision("bf16", torch.device("mps"))


def test_what_another_machine_had_has_a_remedy_in_flags_to_give(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="has none; --device auto takes what there is"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--devices 4: this machine has fewer; give --devices 2"):
        resolve_device("cuda", cards=4)
    assert resolve_device("cuda", cards=2) == torch.device("cuda")


def test_freed_memory_is_not_asked_of_the_kernel_again():
    if not hasattr(ctypes.CDLL(None) if os.name == "posix" else None, "gnu_get_libc_version"):
        pytest.skip("not glibc")
    script = """
import resource, sys
from fish_speech.devices import keep_freed_memory
keep_freed_memory()
bytearray(1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1 << 26)
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > 1000)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_what_keeps_kernels_from_being_compiled_is_named(monkeypatch):
    assert compile_problem(torch.device("cpu")) == "Triton is not for cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "too old" in compile_problem(torch.device("cuda:6"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    pytest.importorskip("triton")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr("triton.runtime.driver", Driver())
    problem = compile_problem(torch.device("cuda:7"))
    assert problem.startswith("Failed to find C compiler;")
    assert problem.endswith("gcc, python3-dev")


def test_no_more_threads_than_cores():
    before = torch.get_num_threads()
    try:
        set_threads(10_000)
        assert torch.get_num_threads() == resources.cores()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("card", "dtype", "masked", "shares"),
    [
        ((8, 0), torch.bfloat16, False, True),
        ((8, 0), torch.bfloat16, True, False),
        ((8, 0), torch.float32, False, False),
        ((7, 5), torch.float16, False, False),
    ],
)
def test_only_flash_attention_shares_keys_on_a_card(monkeypatch, card, dtype, masked, shares):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert shares_keys.__wrapped__(torch.device("cuda"), dtype, masked) is shares
    assert shares_keys(CPU, dtype, masked)
