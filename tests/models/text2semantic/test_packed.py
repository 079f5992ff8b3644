"""Packed weights: the same numbers from fewer bytes, as near as the bytes allow."""

import copy
import ctypes
import os
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fish_speech.devices import has_native_int8
from fish_speech.inference.generate import generate
from fish_speech.inference.sampling import Sampling
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.models.text2semantic.decode import cpu_kernels, packed, thread_team
from fish_speech.models.text2semantic.decode.packed import (
    PackedHead,
    PackedStack,
    PackedWeight,
    pack,
)
from fish_speech.models.text2semantic.decode.thread_team import Team
from fish_speech.models.text2semantic.layers import RMSNorm
from tests.conftest import ROOT

# How far a layer may be off, as a share of its output.
KINDS = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.int8: 0.015}


def model_of(seed=0, n_local_heads=2, **sizes):
    usual = {"dim": 64, "head_dim": 16, "n_layer": 3, "n_head": 4, "n_fast_layer": 2}
    config = ModelConfig(vocab_size=1300, n_local_heads=n_local_heads, **(usual | sizes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DualARTransformer(config).eval()
        for module in model.modules():
            if isinstance(module, RMSNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
    return model


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("columns", [1, 3, 200])
def test_a_layer_gives_nearly_the_same(columns, dtype, native, monkeypatch):
    if native and not has_native_int8(torch.device("cpu")):
        pytest.skip("no int8 instructions")
    monkeypatch.setattr(packed, "has_native_int8", lambda device: native)
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256).bfloat16().float(), torch.randn(2, columns, 256)
    x[:, ::2] *= 100  # a loud column does not spoil a quiet one
    x[..., 7] *= 30  # nor does a loud channel the others
    rows = PackedWeight((3, 96, 256), dtype)
    rows.fill(weight, 1)
    wanted, got = F.linear(x, weight), rows.matmul(x, 1)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert ((got - wanted).norm(dim=-1) < KINDS[dtype] * wanted.norm(dim=-1)).all()


@pytest.mark.skipif(not has_native_int8(torch.device("cpu")), reason="no int8 instructions")
def test_int8_loses_what_its_weights_lose_and_no_more(monkeypatch):
    torch.manual_seed(0)
    rows, x = PackedWeight((1, 256, 512), torch.int8), torch.randn(64, 512)
    x[..., 3] *= 10
    rows.fill(torch.randn(256, 512), 0)
    got = rows.matmul(x, 0)
    monkeypatch.setattr(packed, "has_native_int8", lambda device: False)
    wanted = rows.matmul(x, 0)
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 2, 64), (2, 40, 64)])
def test_a_packed_head_is_the_norm_and_the_output_layer(shape, dtype):
    torch.manual_seed(0)
    norm, weight = RMSNorm(64, 1e-6), torch.randn(50, 64).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    x = torch.randn(shape) + 3  # its mean is not zero
    got = PackedHead(norm, weight)(x)
    torch.testing.assert_close(got, F.linear(norm(x), weight.float()), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_threads_that_share_the_work_give_what_one_gives(size, dtype, monkeypatch):
    model = pack(model_of().bfloat16(), "int8" if dtype == torch.int8 else None)
    made = []
    for team in (Team(1), Team(size)):
        monkeypatch.setattr(thread_team, "team_for", lambda _, team=team: team)
        made.append(torch.stack(frames_of(model)))
    assert torch.equal(*made)


@pytest.mark.parametrize("columns", [1, 3])
def test_what_is_zero_stays_zero(columns):
    """In int8, where both have no scale."""
    model = pack(model_of(), "int8")
    x, rotary = torch.zeros(1, columns, 64), torch.ones(2, columns, 16)
    assert not model.layers[0](x, rotary, None, model.new_cache(columns)).any()
    model = model_of()
    for block in model.layers:
        nn.init.zeros_(block.feed_forward.w2.weight)
        nn.init.zeros_(block.attention.wo.weight)
    x = torch.randn(1, columns, 64)
    assert torch.equal(pack(model, "int8").layers[0](x, rotary, None, model.new_cache(columns)), x)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("local_heads", [1, 2, 4])
def test_a_packed_model_has_the_logits_of_the_model(bias, local_heads):
    model = model_of(n_local_heads=local_heads, **biases(bias))
    tokens = torch.randint(0, 256, (2, 9, 20))
    tokens[:, 0, 8:] += model.semantic_begin_id
    wanted = model(tokens)
    packed = pack(copy.deepcopy(model))
    assert all(isinstance(s, PackedStack) for s in (*packed.layers, *packed.fast_layers))
    got = packed(tokens)
    torch.testing.assert_close(got.token_logits, wanted.token_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.codebook_logits, wanted.codebook_logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
@pytest.mark.parametrize(("bias", "local_heads"), [(False, 1), (True, 2), (False, 4)])
def test_few_columns_at_a_time_are_as_all_at_once(bias, local_heads, dtype, quantize):
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
    most = 2e-4 if quantize else 1e-5  # a step of 16 bits is small beside one of the weights' 8
    assert (got - wanted).norm() < most * wanted.norm()
    codes = torch.randn(1, 8, 64)
    wanted, cache = model.fast_logits(codes), model.new_fast_cache()
    got = torch.cat([model.fast_logits(codes[:, [k]], cache) for k in range(8)], 1)
    assert (got - wanted).norm() < most * wanted.norm()


@pytest.mark.skipif(os.name != "posix", reason="the C library is not known")
@torch.inference_mode()
def test_where_arrays_lie_changes_nothing(monkeypatch):
    """Or a seed speaks otherwise from one start to the next."""
    library, rng = ctypes.CDLL(None), random.Random(0)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    model, calls = pack(model_of(dim=256, head_dim=64), "int8"), []
    with monkeypatch.context() as patch:
        patch.setattr(Team, "run", lambda team, *call: calls.append(call))
        model.fast_logits(torch.randn(1, 2, 256), model.new_fast_cache())
    function, *given = calls[0]
    found, sync, left = set(), np.zeros(cpu_kernels.SYNC_SIZE, np.int64), []
    for _ in range(600):
        left += [library.malloc(rng.choice((24, 56, 88, 136, 300, 1100))) for _ in range(30)]
        rng.shuffle(left)
        for _ in range(20):
            library.free(left.pop())
        arrays = [part.copy() if isinstance(part, np.ndarray) else part for part in given]
        function(0, 1, sync, *arrays)
        found.add(b"".join(part.tobytes() for part in arrays if isinstance(part, np.ndarray)))
    for block in left:
        library.free(block)
    assert len(found) == 1


def biases(bias):
    return {"attention_qkv_bias": bias, "fast_attention_qkv_bias": bias}


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0, 1000.0])
def test_the_gate_is_silu(size):
    """To where e^x leaves the range of fp32."""
    torch.manual_seed(0)
    x = size * torch.randn(1003)
    got = [cpu_kernels.silu(value) for value in x.numpy()]
    wanted = F.silu(x.double()).float()
    torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-30, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 96, "head_dim": 6, "intermediate_size": 7},  # wider than all between
        {"dim": 33, "head_dim": 10, "intermediate_size": 101},
        {"dim": 16, "head_dim": 32, "intermediate_size": 48},
    ],
)
def test_odd_sizes_are_as_good_as_others(sizes, quantize):
    model = pack(model_of(n_local_heads=1, **sizes), quantize)
    tokens = torch.randint(0, 256, (1, 9, 12))
    wanted, cache = model.hidden_states(tokens), model.new_cache(12)
    got = torch.cat(
        [model.hidden_states(tokens[..., t : t + 2], cache=cache) for t in range(0, 12, 2)], 1
    )
    assert (got - wanted).norm() < (1e-3 if quantize else 1e-5) * wanted.norm()


@torch.inference_mode()
def test_fp16_is_packed_as_fp32_which_holds_it():
    model = model_of().half()
    got, wanted = frames_of(pack(copy.deepcopy(model))), frames_of(pack(model.float()))
    assert torch.equal(torch.stack(got), torch.stack(wanted))


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
    code = "import fish_speech.inference.cpu_sampling"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
        assert done.returncode == 0
        kept = list(tmp_path.rglob("*.nbi"))
        assert kept
        for file in kept:
            file.write_bytes(b"")
