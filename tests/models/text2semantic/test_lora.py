import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fish_speech.models.text2semantic.lora import (
    LoRAConfig,
    LoRAFeedForward,
    LoRALinear,
    add_lora,
    effective_weight_rows,
    input_scale,
    load_lora,
    lora_state_dict,
    merge_lora,
)
from fish_speech.training.config import compose_config
from fish_speech.training.loss import loss_sums
from tests.conftest import golden_tensors

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def golden():
    return golden_tensors("lora.pt")


@pytest.fixture
def adapted(model, golden):
    add_lora(model, LoRAConfig())
    load_lora(model, golden["lora_ckpt"]["state_dict"], "golden")
    return model


def mean_loss(model):
    batch = golden_tensors("train_step.pt")["batch"]
    sums = loss_sums(model, batch["inputs"], batch["labels"])
    return sums, sums.loss(sums.tokens, sums.codes)


def test_loss_and_gradients_equal_the_reference(adapted, golden):
    sums, loss = mean_loss(adapted)
    loss.backward()
    assert loss.item() == pytest.approx(golden["metrics"]["train/loss"], rel=1e-4)
    assert float(sums.top5 / sums.codes) == pytest.approx(golden["metrics"]["train/top_5_accuracy"])
    parameters = dict(adapted.named_parameters())
    gradients = {name: parameters[name].grad for name in golden["lora_grads"]}
    torch.testing.assert_close(gradients, golden["lora_grads"], **TOLERANCE)
    assert {name for name, p in parameters.items() if p.requires_grad} == set(
        lora_state_dict(adapted)
    )


def test_the_fast_transformer_can_be_adapted_alone(model):
    add_lora(model, compose_config(["project=p", "lora=fast_r_8_alpha_160"]).adapters)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = range(model.config.n_fast_layer)
    inside = ("attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3)))
    modules = {"fast_output", *(f"fast_layers.{i}.{name}" for i in layers for name in inside)}
    assert adapters == {f"{module}.lora_{half}" for module in modules for half in "AB"}
    sums, loss = mean_loss(model.train())
    assert not sums.token.requires_grad  # the slow one is as quick as without training
    loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in adapters)


@torch.no_grad()
def test_merged_weights_equal_the_reference_and_act_alike(adapted, golden):
    before = float(mean_loss(adapted)[1])
    merge_lora(adapted)
    merged = adapted.state_dict()
    expected = dict(golden["merged"])
    every_16th = expected.pop("codebook_embeddings.weight")
    torch.testing.assert_close(merged["codebook_embeddings.weight"][::16], every_16th, **TOLERANCE)
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, **TOLERANCE)
    assert not lora_state_dict(adapted)
    assert float(mean_loss(adapted)[1]) == pytest.approx(before, rel=1e-4)


@torch.no_grad()
def test_fresh_adapters_change_nothing(model):
    before = float(mean_loss(model)[1])
    add_lora(model, LoRAConfig())
    assert float(mean_loss(model)[1]) == pytest.approx(before, abs=1e-6)


def test_switching_modes_never_touches_the_base(adapted):
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    for _ in range(3):
        adapted.train()
        adapted.eval()
    torch.testing.assert_close(adapted.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_fp32_over_a_low_precision_base(model, dtype):
    model.to(dtype)
    add_lora(model, LoRAConfig())
    assert {v.dtype for v in lora_state_dict(model).values()} == {torch.float32}
    loss = mean_loss(model)[1]
    loss.backward()
    assert model.layers[0].attention.wqkv.lora_B.grad.dtype == torch.float32
    assert model.layers[0].attention.wqkv.lora_B.grad.abs().sum() > 0


@torch.no_grad()
def test_rows_of_an_adapted_weight_are_those_of_the_merged_one(adapted):
    rows = torch.tensor([404, 412, 1000])
    output, embeddings = (
        effective_weight_rows(module, rows) for module in (adapted.output, adapted.embeddings)
    )
    merge_lora(adapted)
    torch.testing.assert_close(output, adapted.output.weight[rows])
    torch.testing.assert_close(embeddings, adapted.embeddings.weight[rows])


def test_adapters_of_another_rank_are_refused_by_name(model, golden):
    add_lora(model, LoRAConfig(r=4, alpha=8))
    with pytest.raises(ValueError, match=r"golden: .*lora_A' is \(8, \d+\) in the file, \(4, "):
        load_lora(model, golden["lora_ckpt"]["state_dict"], "golden")


def test_missing_adapters_are_refused(adapted, golden):
    some = dict(list(golden["lora_ckpt"]["state_dict"].items())[:-1])
    with pytest.raises(ValueError, match=r"is none in the file"):
        load_lora(adapted, some, "half a file")


def test_targets_choose_the_modules(model):
    add_lora(model, LoRAConfig(targets=("wo", "fast_embeddings")))
    assert {key.split(".")[-2] for key in lora_state_dict(model)} == {"wo", "fast_embeddings"}
    with pytest.raises(ValueError, match="wqvk"):
        LoRAConfig(targets=("wqvk",))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [0, 10])
def test_a_small_update_of_a_base_in_bf16_is_not_rounded_away(bias, residual):
    """Nor where it is added to something larger, as all of a block is."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(256, 256, bias=bias).bfloat16(), LoRAConfig(), torch.Generator())
    nn.init.normal_(layer.lora_B, std=1e-4)
    x = torch.randn(2, 500, 256).bfloat16()
    wanted = x.float() @ layer.delta_weight().T  # far below what bf16 tells apart in the output
    past = (residual * torch.randn(x.shape)).bfloat16() if residual else None
    plain = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    got = layer(x, past).float() - plain - (past.float() if residual else 0)
    assert (got * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=0.1 + residual / 40)


def test_dropout_before_the_adapters_takes_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(20_000, 3), LoRAConfig(dropout=0.1), torch.Generator())
    scale = input_scale(layer)
    assert sorted(scale.unique().tolist()) == [0, pytest.approx(layer.scaling / 0.9)]
    assert 0.09 < (scale == 0).float().mean() < 0.11

    layer = LoRALinear(
        nn.Linear(50, 3, bias=False), LoRAConfig(dropout=0.1), torch.Generator().manual_seed(0)
    )
    nn.init.normal_(layer.lora_B)
    x = torch.ones(4, 50)
    without, wanted = layer.without_lora()(x), layer.eval()(x)
    steps = torch.stack([layer.train()(x) for _ in range(10_000)])
    assert not torch.equal(steps[0], steps[1])
    torch.testing.assert_close(
        steps.mean((0, 1)) - without[0], (wanted - without)[0], rtol=0.02, atol=0.01
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0, 0.3])
def test_gradients_of_an_adapted_layer_are_those_of_its_formula(bias, dropout):
    torch.manual_seed(0)
    layer = LoRALinear(
        nn.Linear(12, 7, bias=bias), LoRAConfig(r=3, dropout=dropout), torch.Generator()
    ).double()
    layer.requires_grad_(False)
    layer.lora_A.requires_grad_(True)
    nn.init.normal_(layer.lora_B.requires_grad_(True))
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)

    def adapted(x, lora_A, lora_B):
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    assert torch.autograd.gradcheck(adapted, (x, layer.lora_A, layer.lora_B))


def adapted_layers(*shapes):
    torch.manual_seed(0)
    config = LoRAConfig(r=3, dropout=0.3)
    layers = [LoRALinear(nn.Linear(*s, bias=False), config, torch.Generator()) for s in shapes]
    for layer in layers:
        layer.double().requires_grad_(False)
        nn.init.normal_(layer.lora_B)
    return layers


def test_gradients_of_adapted_feed_forward_are_those_of_its_formula():
    layers = adapted_layers((6, 8), (6, 8), (8, 6))
    halves = [half.requires_grad_() for layer in layers for half in (layer.lora_A, layer.lora_B)]
    x, residual = (torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True) for _ in range(2))

    def out(x, residual, *_):
        torch.manual_seed(1)
        return LoRAFeedForward(*layers)(x, residual)

    w1, w3, w2 = layers
    torch.manual_seed(1)
    wanted = residual + w2(F.silu(w1(x)) * w3(x))
    torch.testing.assert_close(out(x, residual), wanted)
    assert torch.autograd.gradcheck(out, (x, residual, *halves))


def test_adapted_feed_forward_keeps_half_as_much_for_its_gradient():
    layers, width, rows = adapted_layers((8, 512), (8, 512), (512, 8)), 512, 400

    def kept_numbers(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ):
            function(torch.randn(rows, 8, dtype=torch.double, requires_grad=True))
        return sum(x.numel() for x in kept.values())

    w1, w3, w2 = layers
    plain = kept_numbers(lambda x: w2(F.silu(w1(x)) * w3(x)))
    assert 4 * rows * width < plain
    assert kept_numbers(lambda x: LoRAFeedForward(*layers)(x, x)) < 2.5 * rows * width
