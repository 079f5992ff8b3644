"""int8 weights: a quarter of the bytes, nearly the same numbers."""

import pytest
import torch
from torch import nn

from fish_speech.inference.generate import generate
from fish_speech.inference.sampling import Sampling
from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.models.text2semantic.quantize import Int8Linear, quantize_int8


def model_of(seed=0):
    config = ModelConfig(
        vocab_size=1300, dim=64, n_layer=3, n_head=4, n_local_heads=2, head_dim=16, n_fast_layer=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DualARTransformer(config).eval()


@pytest.mark.parametrize("columns", [1, 15, 16, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_nearly_the_same_for_few_columns_and_many(columns, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 96, bias=bias), torch.randn(2, columns, 256)
    wanted, got = linear(x), Int8Linear(linear)(x)
    assert got.shape == wanted.shape
    assert got.dtype == x.dtype
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_a_channel_of_zeros_stays_zero():
    linear = nn.Linear(32, 4, bias=False)
    nn.init.zeros_(linear.weight)
    assert not Int8Linear(linear)(torch.ones(1, 32)).any()


@torch.no_grad()
def test_the_model_keeps_its_logits_with_a_quarter_of_the_bytes():
    model, tokens = model_of(), torch.randint(0, 256, (1, 9, 20))
    wanted = model(tokens).token_logits
    blocks = sum(p.nbytes for p in model.layers.parameters())
    quantize_int8(model)
    assert sum(t.nbytes for t in model.layers.state_dict().values()) < 0.27 * blocks
    got = model(tokens).token_logits
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert not torch.equal(got, wanted)


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
