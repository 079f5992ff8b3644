"""Packed weights: the same numbers from fewer bytes, as near as the bytes allow."""

import copy
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fish_speech.inference.generate import generate
from fish_speech.inference.sampling import Sampling
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig, column, packed
from fish_speech.models.text2semantic.llama import RMSNorm
from fish_speech.models.text2semantic.packed import (
    FloatLinear,
    HalfLinear,
    Int8Linear,
    PackedBlock,
    PackedNorm,
    PortableInt8Linear,
    pack,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not HalfLinear.is_native(), reason="no fbgemm in this torch")
# How far a layer may be off, as a share of its output.
KINDS = {FloatLinear: 1e-5, HalfLinear: 1e-3, Int8Linear: 0.01, PortableInt8Linear: 0.02}


def model_of(seed=0, n_local_heads=2, **sizes):
    config = ModelConfig(
        vocab_size=1300,
        dim=64,
        n_layer=3,
        n_head=4,
        n_local_heads=n_local_heads,
        head_dim=16,
        n_fast_layer=2,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DualARTransformer(config).eval()
        for module in model.modules():
            if isinstance(module, RMSNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 3, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_nearly_the_same_for_few_columns_and_many(columns, bias, kind):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 96, bias=bias), torch.randn(2, columns, 256)
    x[:, ::2] *= 100  # a loud column does not spoil a quiet one
    x[..., 7] *= 30  # nor does a loud channel the others
    wanted, got = linear(x), kind(linear)(x)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert ((got - wanted).norm(dim=-1) < KINDS[kind] * wanted.norm(dim=-1)).all()


def test_int8_loses_what_its_weights_lose_and_no_more():
    torch.manual_seed(0)
    linear, x = nn.Linear(512, 256, bias=False), torch.randn(1, 64, 512)
    x[..., 3] *= 10
    packed = Int8Linear(linear)
    exact = copy.deepcopy(linear)
    scale = exact.weight.data.abs().amax(1, keepdim=True) / 127
    exact.weight.data.div_(scale).round_().mul_(scale)
    got, rounded_weights, wanted = packed(x), exact(x), linear(x)
    assert (got - rounded_weights).norm() < 0.1 * (rounded_weights - wanted).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 3])
def test_what_is_zero_stays_zero(kind, columns):
    linear = nn.Linear(32, 4, bias=False)
    assert not kind(linear)(torch.zeros(1, columns, 32)).any()
    nn.init.zeros_(linear.weight)
    assert not kind(linear)(torch.ones(1, columns, 32)).any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_packed_norm_is_the_norm(size):
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    x = size * (torch.randn(2, 5, 64) + 3)  # its mean is not zero
    torch.testing.assert_close(PackedNorm(norm)(x), norm(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("local_heads", [1, 2, 4])
def test_a_packed_model_has_the_logits_of_the_model(bias, local_heads):
    model = model_of(n_local_heads=local_heads, **biases(bias))
    tokens = torch.randint(0, 256, (2, 9, 20))
    tokens[:, 0, 8:] += model.semantic_begin_id
    wanted = model(tokens)
    packed = pack(copy.deepcopy(model))
    assert all(isinstance(block, PackedBlock) for block in (*packed.layers, *packed.fast_layers))
    got = packed(tokens)
    torch.testing.assert_close(got.token_logits, wanted.token_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.codebook_logits, wanted.codebook_logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("short", [0, 10, 1000])
@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
@pytest.mark.parametrize(("bias", "local_heads"), [(False, 1), (True, 2), (False, 4)])
def test_few_columns_at_a_time_are_as_all_at_once(
    bias, local_heads, dtype, quantize, short, monkeypatch
):
    monkeypatch.setattr(packed, "_SHORT", short)
    model = model_of(n_local_heads=local_heads, **biases(bias))
    model = pack(model.to(getattr(torch, dtype)), quantize)
    tokens = torch.randint(0, 256, (1, 9, 20))
    tokens[:, 0, 8:] += model.semantic_begin_id
    wanted = model.hidden_states(tokens)
    cache = model.new_cache(20)
    ends = [5, 6, 7, 9, 10, 13, *range(14, 21)]  # one column, and a few
    parts = [model.hidden_states(tokens[..., :5], cache=cache)]
    parts += [model.hidden_states(tokens[..., a:b], cache=cache) for a, b in pairwise(ends)]
    got = torch.cat(parts, 1)
    # What is left after rounding in two parts is a hundredth of a hundredth.
    most = 1e-3 if quantize else 1e-5
    assert (got - wanted).norm() < most * wanted.norm()
    codes = torch.randn(1, 8, 64)
    wanted, cache = model.fast_logits(codes), model.new_fast_cache()
    got = torch.cat([model.fast_logits(codes[:, [k]], cache) for k in range(8)], 1)
    assert (got - wanted).norm() < most * wanted.norm()


def biases(bias):
    return {"attention_qkv_bias": bias, "fast_attention_qkv_bias": bias}


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0, 1000.0])
def test_the_gate_is_silu(size):
    """To where e^x leaves the range of fp32, and for the vector's rest as for its whole part."""
    torch.manual_seed(0)
    both = size * torch.randn(1, 2 * 1003)
    gate, up = both.double().chunk(2, -1)
    rows = np.empty((1, 1, 1003), np.float32)
    column.gate(both.numpy()[None], np.ones(1, np.float32), rows)
    wanted = F.silu(gate) * up
    torch.testing.assert_close(torch.from_numpy(rows[0]).double(), wanted, atol=1e-30, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("quantize", "most"), [(None, 0.5), ("int8", 1.5)])
def test_a_bf16_model_is_packed_to_about_its_own_exactness(quantize, most):
    exact, low = model_of(), model_of().bfloat16()
    tokens = torch.randint(0, 256, (1, 9, 20))
    wanted, unpacked = exact(tokens).token_logits, low(tokens).token_logits.float()
    packed = pack(copy.deepcopy(low), quantize)
    assert packed.dtype == torch.float32  # of its activations
    assert packed.stored_dtype == torch.bfloat16
    as_exact = low.float()(tokens).token_logits  # the bf16 weights, multiplied in fp32
    error = (packed(tokens).token_logits - as_exact).norm()
    assert error < most * (unpacked - as_exact).norm() + 0.02 * wanted.norm() * bool(quantize)


def test_without_the_kernels_int8_still_works(monkeypatch):
    monkeypatch.setattr(HalfLinear, "is_native", staticmethod(lambda: False))
    model = pack(model_of().bfloat16(), "int8")
    assert isinstance(model.layers[0].wo, PortableInt8Linear)
    assert pack(model_of()).layers[0].attention.wqkv.weight is not None  # nothing to pack with
    assert len(frames_of(model)) == 5


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_generates(dtype, quantize):
    model = model_of().to(dtype)
    wanted = frames_of(model.float())
    frames = frames_of(pack(model.to(dtype), quantize))
    assert len(frames) == 5
    if dtype == torch.float32 and quantize is None:
        assert torch.equal(frames[0], wanted[0])


def frames_of(model):
    prompt = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0)
    return list(generate(model, prompt, im_end_id=270, max_new_tokens=5, sampling=sampling))


def test_int8_is_refused_where_it_brings_nothing():
    with pytest.raises(ValueError, match="int8 is for the CPU, not for meta"):
        pack(model_of().to("meta"), "int8")
    assert isinstance(pack(model_of().to("meta")).embeddings, nn.Embedding)  # as it was


@pytest.mark.slow
def test_kept_kernels_that_are_broken_are_compiled_again(tmp_path):
    """As after a power cut or on a full disk."""
    code = f"import {column.__name__}"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
        assert done.returncode == 0
        kept = list(tmp_path.rglob("*.nbi"))
        assert kept
        for file in kept:
            file.write_bytes(b"")
