"""Kernels for CUDA between the products; without a card Triton interprets them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fish_speech.models.text2semantic import llama
from fish_speech.models.text2semantic.llama import RMSNorm, rotary_table, rotate
from fish_speech.training.loss import cross_entropy, loss_sums
from tests.conftest import golden_tensors

pytest.importorskip("triton")
from fish_speech.models.text2semantic import cuda_fused as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_same(make, wanted, *inputs):
    """Two functions have the same results and gradients."""
    results = []
    for function in (make, wanted):
        taken = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*taken)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        slopes = [torch.randn(o.shape, generator=generator).to(o) for o in out]
        results.append((out, torch.autograd.grad(out, taken, slopes)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("dim", [64, 100])
def test_a_norm(dim):
    norm = RMSNorm(dim, 1e-6).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(1 + 0.1 * randn(dim))
    assert_same(
        lambda x: fused.norm(x, norm.weight, norm.eps),
        lambda x: F.rms_norm(x, (dim,), norm.weight, norm.eps),
        3 * randn(2, 3, dim),
    )
    low, x = norm.bfloat16(), (3 * randn(2, 3, dim)).bfloat16()
    torch.testing.assert_close(fused.norm(x, low.weight, low.eps), low(x))


def test_a_gate():
    assert_same(
        fused.gated, lambda gate, up: F.silu(gate) * up, 3 * randn(5, 700), randn(5, 700).flip(0)
    )


@pytest.mark.parametrize(("heads", "local", "size"), [(4, 2, 16), (3, 1, 10)])
def test_queries_keys_and_values_turn(heads, local, size):
    rotary = rotary_table(11, size, 10_000.0, DEVICE)[:, 2:9]

    def plain(qkv):
        parts = qkv.unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = parts.split([heads, local, local], dim=1)
        return tuple(x.transpose(1, 2) for x in (rotate(q, rotary), rotate(k, rotary), v))

    qkv = randn(2, 7, (heads + 2 * local) * size)
    assert_same(lambda x: fused.turned(x, rotary, heads, local), plain, qkv)


def test_a_cross_entropy(monkeypatch):
    logits, targets = 5 * randn(6, 9000), torch.tensor([0, 8999, 3, 4096, 17, 4095]).to(DEVICE)
    monkeypatch.setattr("fish_speech.training.loss.fused_for", lambda x: fused)
    assert_same(
        lambda x: 3 * cross_entropy(x * 1, targets),
        lambda x: 3 * F.cross_entropy(x, targets, reduction="sum"),
        logits,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_with_all_of_it(model, dtype, monkeypatch):
    """Short rows that are attended to together included."""
    golden = golden_tensors("train_step.pt")["batch"]
    batch = [golden[name][1:2, :, 90:].to(DEVICE) for name in ("inputs", "labels")]
    model = model.to(DEVICE, dtype).requires_grad_(False)
    model.codebook_embeddings.requires_grad_(True)
    exact = copy.deepcopy(model).float()

    def step(model):
        model.zero_grad()
        sums = loss_sums(model, *batch)
        sums.loss(sums.tokens, sums.codes).backward()
        return sums.token, sums.codebook, model.codebook_embeddings.weight.grad.clone()

    wanted, plain = step(exact), step(model)
    monkeypatch.setattr(llama, "fused_for", lambda x: fused)
    monkeypatch.setattr("fish_speech.training.loss.fused_for", lambda x: fused)
    for got, before, expected in zip(step(model), plain, wanted, strict=True):
        off, most = ((x - expected).float().norm() / expected.norm() for x in (got, before))
        # What bf16 rounds between the products, more or less; the interpreter cuts it off instead.
        more = 1.2 if DEVICE == "cuda" else 4
        assert off < (1e-4 if dtype == torch.float32 else max(0.01, more * most))
