"""Which number format a device gets."""

import pytest
import torch

from fish_speech.devices import (
    resolve_device,
    resolve_precision,
    supports_gqa,
    triton_unavailable_reason,
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


def test_what_keeps_kernels_from_being_compiled_is_named(monkeypatch):
    assert triton_unavailable_reason(torch.device("cpu")) == "Triton is not for cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "too old" in triton_unavailable_reason(torch.device("cuda:6"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    pytest.importorskip("triton")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr("triton.runtime.driver", Driver())
    problem = triton_unavailable_reason(torch.device("cuda:7"))
    assert problem.startswith("Failed to find C compiler;")
    assert problem.endswith("gcc, python3-dev")


@pytest.mark.parametrize(
    ("card", "dtype", "masked", "supported"),
    [
        ((8, 0), torch.bfloat16, False, True),
        ((8, 0), torch.bfloat16, True, False),
        ((8, 0), torch.float32, False, False),
        ((7, 5), torch.float16, False, False),
    ],
)
def test_only_flash_attention_supports_gqa_on_a_card(monkeypatch, card, dtype, masked, supported):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert supports_gqa.__wrapped__(torch.device("cuda"), dtype, masked) is supported
    assert supports_gqa(CPU, dtype, masked)
