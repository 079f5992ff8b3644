"""What lies between the products, with its gradients: in torch's operations, and as kernels for
CUDA, which Triton interprets where there is no card."""

import copy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from fish_speech.models.text2semantic.layers import FeedForward, RMSNorm, rotary_table
from fish_speech.models.text2semantic.lora import LoRAConfig, LoRAFeedForward, LoRALinear
from fish_speech.models.text2semantic.ops import fused
from fish_speech.training.loss import loss_sums
from tests.conftest import golden_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use(kind, monkeypatch):
    kernels = None
    if kind == "cuda":
        pytest.importorskip("triton")
        kernels = import_module("fish_speech.models.text2semantic.ops.triton_ops")
    monkeypatch.setattr(fused, "triton_ops_for", lambda x: kernels)


@pytest.fixture(params=["torch", "cuda"])
def kind(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


def assert_same(make, wanted, *inputs):
    """Two functions have the same results and gradients."""
    results = []
    for function in (make, wanted):
        taken = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*taken)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).to(o) for o in out]
        results.append((out, torch.autograd.grad(out, taken, grads)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.usefixtures("kind")
def test_a_norm(dim):
    norm = RMSNorm(dim, 1e-6).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(1 + 0.1 * randn(dim))
    assert_same(
        norm,
        lambda x: F.rms_norm(x, (dim,), norm.weight, norm.eps),
        3 * randn(2, 3, dim),
    )
    low, x = norm.bfloat16(), (3 * randn(2, 3, dim)).bfloat16()
    wide = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16()
    torch.testing.assert_close(low(x), wide * low.weight)


@pytest.mark.usefixtures("kind")
def test_a_gate():
    assert_same(
        fused.silu_mul, lambda gate, up: F.silu(gate) * up, 3 * randn(5, 700), randn(5, 700).flip(0)
    )


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(("heads", "local", "size"), [(4, 2, 16), (3, 1, 10)])
def test_queries_keys_and_values_turn(heads, local, size):
    rotary = rotary_table(11, size, 10_000.0, DEVICE)[:, 2:9]
    turns = torch.view_as_complex(torch.stack([rotary[0, :, ::2], rotary[1, :, 1::2]], -1))

    def plain(qkv):
        q, k, v = qkv.unflatten(-1, (-1, size)).split([heads, local, local], dim=2)
        pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (q, k))
        return *(torch.view_as_real(x * turns[:, None]).flatten(-2) for x in pairs), v

    qkv = randn(2, 7, (heads + 2 * local) * size)
    assert_same(lambda x: fused.apply_rope(x, rotary, heads, local), plain, qkv)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(("columns", "heads", "local", "size"), [(8, 16, 2, 64), (3, 6, 2, 10)])
def test_a_few_positions_attend_to_each_other(columns, heads, local, size):
    def plain(q, k, v):
        parts = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    shapes = [(5, columns, count, size) for count in (heads, local, local)]
    assert_same(fused.short_attention, plain, *(randn(*shape) for shape in shapes))


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(("rank", "bias"), [(8, False), (3, True)])
def test_adapted_layers_and_what_they_are_added_to(rank, bias):
    shapes = (100, 140), (100, 140), (140, 100)
    layers = [torch.nn.Linear(*shape, bias=bias).to(DEVICE) for shape in shapes]
    config = LoRAConfig(r=rank, dropout=0.0)
    adapted = [LoRALinear(layer, config, torch.Generator()).to(DEVICE) for layer in layers]
    for layer in adapted:
        torch.nn.init.normal_(layer.lora_B.requires_grad_(False), 0, 0.1)
        layer.requires_grad_(False)

    def plain(number, x):
        layer = adapted[number]
        return F.linear(x, layer.weight + layer.delta_weight(), layer.bias)

    assert_same(
        (FeedForward if bias else LoRAFeedForward)(*adapted),
        lambda x, residual: residual + plain(2, F.silu(plain(0, x)) * plain(1, x)),
        *(randn(2, 35, 100), randn(2, 35, 100).flip(0)),
    )


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("rank", [8, 3])
def test_the_factors_of_an_adapter_in_low_precision(rank):
    A, B, keep = randn(rank, 300), randn(200, rank), randn(300)
    made = fused.ops_for(A)
    down, up = made.cast_lora_factors(A, B, keep, torch.bfloat16)
    torch.testing.assert_close(down, (A * keep).bfloat16(), atol=0, rtol=0.01)  # or cut off
    torch.testing.assert_close(up, B.T.bfloat16(), atol=0, rtol=0.01)
    to_A, to_B = made.cast_lora_factors_backward(down, up, keep)
    torch.testing.assert_close(to_A, down.float() * keep)
    torch.testing.assert_close(to_B, up.float().T)


@pytest.mark.usefixtures("kind")
def test_a_cross_entropy():
    logits, targets = 5 * randn(6, 9000), torch.tensor([0, 8999, 3, -100, 17, 4095]).to(DEVICE)
    assert_same(
        lambda x: 3 * fused.cross_entropy(x * 1, targets),
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
    use("cuda", monkeypatch)
    for got, before, expected in zip(step(model), plain, wanted, strict=True):
        off, most = ((x - expected).float().norm() / expected.norm() for x in (got, before))
        # What bf16 rounds between the products, more or less; the interpreter cuts it off instead.
        more = 1.2 if DEVICE == "cuda" else 4
        assert off < (1e-4 if dtype == torch.float32 else max(0.01, more * most))
