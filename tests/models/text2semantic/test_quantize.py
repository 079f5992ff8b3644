"""int8 weights: a quarter of the bytes, nearly the same numbers."""

import pytest
import torch
from torch import nn

from fish_speech.inference.generate import generate
from fish_speech.inference.sampling import Sampling
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.models.text2semantic.quantize import (
    DynamicInt8Linear,
    HalfLinear,
    Int8Linear,
    pack_half,
    quantize_int8,
)

KINDS = [Int8Linear] + [DynamicInt8Linear] * DynamicInt8Linear.is_native()


def model_of(seed=0):
    config = ModelConfig(
        vocab_size=1300, dim=64, n_layer=3, n_head=4, n_local_heads=2, head_dim=16, n_fast_layer=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DualARTransformer(config).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 15, 16, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_nearly_the_same_for_few_columns_and_many(columns, bias, kind):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 96, bias=bias), torch.randn(2, columns, 256)
    x[:, ::2] *= 100  # a loud column does not spoil a quiet one
    wanted, got = linear(x), kind(linear)(x)
    assert got.shape == wanted.shape
    assert got.dtype == x.dtype
    assert ((got - wanted).norm(dim=-1) < 0.025 * wanted.norm(dim=-1)).all()
    assert kind(linear.bfloat16())(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 3])
def test_what_is_zero_stays_zero(kind, columns):
    linear = nn.Linear(32, 4, bias=False)
    assert not kind(linear)(torch.zeros(1, columns, 32)).any()
    nn.init.zeros_(linear.weight)
    assert not kind(linear)(torch.ones(1, columns, 32)).any()


@torch.no_grad()
def test_the_model_keeps_its_logits_with_a_quarter_of_the_bytes():
    model, tokens = model_of(), torch.randint(0, 256, (1, 9, 20))
    wanted = model(tokens).token_logits
    quantize_int8(model)
    for blocks in (model.layers, model.fast_layers):
        assert not any(isinstance(module, nn.Linear) for module in blocks.modules())
        weights = [m.weight for m in blocks.modules() if isinstance(m, Int8Linear)]
        assert all(weight.dtype == torch.int8 for weight in weights)
    got = model(tokens).token_logits
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert not torch.equal(got, wanted)


@pytest.mark.parametrize("native", [True, False])
def test_inputs_are_int8_only_where_the_cpu_multiplies_it_and_never_behind_swiglu(
    monkeypatch, native
):
    if native and len(KINDS) == 1:
        pytest.skip("this CPU has no instructions for int8 products")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": native})
    layers = quantize_int8(model_of()).fast_layers[0]
    assert isinstance(layers.attention.wqkv, DynamicInt8Linear) == native
    assert isinstance(layers.feed_forward.w1, DynamicInt8Linear) == native
    assert isinstance(layers.feed_forward.w2, Int8Linear)


def test_a_quantized_model_generates():
    model = quantize_int8(model_of().bfloat16())
    prompt = torch.randint(0, 256, (9, 12))
    frames = generate(
        model, prompt, im_end_id=270, max_new_tokens=5, sampling=Sampling(temperature=0)
    )
    assert len(list(frames)) == 5


def test_int8_is_refused_where_it_brings_nothing():
    with pytest.raises(ValueError, match="int8 is for the CPU, not for meta"):
        quantize_int8(model_of().to("meta"))


needs_kernel = pytest.mark.skipif(not HalfLinear.is_native(), reason="no fp16 kernel in this torch")


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_half_weights_are_those_of_bf16_and_the_products_better(columns, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 96, bias=bias).bfloat16(), torch.randn(2, columns, 256)
    half = HalfLinear(linear)
    torch.testing.assert_close(half(x), linear.float()(x), atol=1e-5, rtol=1e-5)


@needs_kernel
def test_only_a_bf16_model_is_packed_and_it_says_the_same():
    exact = model_of()
    assert any(isinstance(module, nn.Linear) for module in pack_half(exact).layers.modules())
    low, packed = model_of().bfloat16(), pack_half(model_of().bfloat16())
    assert not any(isinstance(module, nn.Linear) for module in packed.layers.modules())
    tokens = torch.randint(0, 256, (1, 9, 20))
    with torch.no_grad():
        wanted, unpacked, got = (m(tokens).token_logits.float() for m in (exact, low, packed))
    assert (got - wanted).norm() < 1.05 * (unpacked - wanted).norm()
