import pytest
import torch

from fish_speech.conversation import IGNORE_INDEX
from fish_speech.models.text2semantic import layers
from fish_speech.training.loss import loss_sums
from tests.conftest import golden_tensors

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def golden():
    return golden_tensors("train_step.pt")


@torch.no_grad()
def test_logits_equal_the_reference(model, golden):
    batch = golden["batch"]
    output = model(batch["inputs"], batch["attention_masks"])
    torch.testing.assert_close(output.token_logits[:, ::28], golden["token_logits"], **TOLERANCE)
    torch.testing.assert_close(
        output.codebook_logits[:, ::26], golden["codebook_logits"], **TOLERANCE
    )


def test_losses_and_gradients_equal_the_reference(model, golden):
    batch, metrics = golden["batch"], golden["metrics"]
    sums = loss_sums(model, batch["inputs"], batch["labels"])
    sums.loss(sums.tokens, sums.codes).backward()
    token, codebook = (x.item() for x in (sums.token / sums.tokens, sums.codebook / sums.codes))
    assert token == pytest.approx(metrics["train/base_loss"], rel=1e-4)
    assert codebook == pytest.approx(metrics["train/semantic_loss"], rel=1e-4)
    assert float(sums.top5 / sums.codes) == pytest.approx(metrics["train/top_5_accuracy"])
    gradients = {name: p.grad for name, p in model.named_parameters() if name in golden["grads"]}
    assert gradients.keys() == golden["grads"].keys()
    torch.testing.assert_close(gradients, golden["grads"], **TOLERANCE)


def test_training_looks_at_labels_only_and_agrees_with_the_whole_output(model, golden):
    batch = golden["batch"]
    rows = {}
    for name in ("output", "fast_layers.0"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows.update({name: len(args[0])})
        )
    sums = loss_sums(model, batch["inputs"], batch["labels"])
    assert rows["output"] == (batch["labels"][:, 0] != IGNORE_INDEX).sum()
    assert rows["fast_layers.0"] == (batch["labels"][:, 1] != IGNORE_INDEX).sum()
    output = model(batch["inputs"], batch["attention_masks"])
    whole = torch.nn.functional.cross_entropy(
        output.token_logits.flatten(0, 1),
        batch["labels"][:, 0].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    assert sums.tokens == int((batch["labels"][:, 0] != IGNORE_INDEX).sum())
    torch.testing.assert_close(sums.token, whole)


@torch.no_grad()
def test_a_batch_gives_what_its_items_give_one_by_one(model, golden):
    batch = golden["batch"]
    together = model(batch["inputs"], batch["attention_masks"])
    for row, item in enumerate(golden["items"]):
        alone = model(item["tokens"][None])
        length = item["tokens"].shape[1]
        torch.testing.assert_close(
            together.token_logits[row, :length], alone.token_logits[0], **TOLERANCE
        )
        torch.testing.assert_close(
            together.codebook_logits[row, : length - 1], alone.codebook_logits[0, :-1], **TOLERANCE
        )


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 20, [7, 5, 8], [20]])
def test_the_cache_changes_nothing(model, golden, parts):
    tokens = golden["items"][0]["tokens"][None, :, :20]
    whole = model.hidden_states(tokens)
    cache = model.new_cache(20)
    pieces = [model.hidden_states(part, cache=cache) for part in tokens.split(parts, dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **TOLERANCE)


@torch.no_grad()
def test_the_fast_cache_changes_nothing(model):
    x = torch.randn(3, 8, model.config.fast_dim, generator=torch.Generator().manual_seed(0))
    cache = model.new_fast_cache(batch=3)
    pieces = [model.fast_logits(part, cache) for part in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.fast_logits(x), **TOLERANCE)


def test_gradient_checkpointing_gives_the_same_gradients(model, golden):
    batch = golden["batch"]
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        model.gradient_checkpointing = checkpointing
        loss_sums(model, batch["inputs"], batch["labels"]).token.backward()
        gradients.append(model.layers[0].attention.wqkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_low_precision_stays_close_and_mixes_nothing(model, golden, dtype, share):
    tokens = golden["items"][0]["tokens"][None]
    full = model(tokens).token_logits
    low = model.to(dtype)(tokens).token_logits
    assert low.dtype == dtype
    assert (low.float() - full).abs().mean() < share * full.abs().mean()


def test_keys_that_heads_share_may_as_well_be_given_to_each(model, golden, monkeypatch):
    # As to memory-efficient attention on CUDA, which is the one for fp32.
    def gradients(mask):
        hidden = model.hidden_states(tokens, mask)
        model.zero_grad()
        hidden.square().mean().backward()
        return hidden, [p.grad for p in model.layers.parameters()]

    tokens, padding = golden["batch"]["inputs"], golden["batch"]["attention_masks"]
    expected = [gradients(mask) for mask in (None, padding)]
    kernel, given = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(q, k, v, **options):
        given.add((q.shape[1] == k.shape[1] == v.shape[1], options["enable_gqa"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(layers, "supports_gqa", lambda *_: False)
    torch.testing.assert_close([gradients(mask) for mask in (None, padding)], expected, **TOLERANCE)
    assert given == {(True, False)}


@torch.no_grad()
def test_attention_whose_kernel_answers_transposed_is_the_same(model, golden, monkeypatch):
    # As CUDA's memory-efficient kernel does, which is the one for fp32.
    tokens = golden["batch"]["inputs"][:1, :, :1]
    expected = model.hidden_states(tokens)
    kernel = torch.nn.functional.scaled_dot_product_attention

    def transposed(*arguments, **options):
        out = kernel(*arguments, **options)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", transposed)
    assert torch.equal(model.hidden_states(tokens), expected)
