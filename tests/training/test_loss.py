"""The loss, of which a piece at a time is computed."""

import pytest
import torch

from fish_speech.models.text2semantic import DualARTransformer, ModelConfig
from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora, merge_lora
from fish_speech.training import loss
from tests.conftest import golden_tensors


def batch():
    golden = golden_tensors("train_step.pt")["batch"]
    return golden["inputs"], golden["labels"]


def gradients(model):
    model.train().zero_grad()
    torch.manual_seed(0)
    sums = loss.loss_sums(model, *batch())
    sums.loss(sums.tokens, sums.codes).backward()
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


TARGETS = ("wqkv", "w1", "w2", "w3", "output", "fast_output", "fast_embeddings")


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_pieces_are_as_all_at_once(model, low, checkpointing, monkeypatch):
    """Nothing is computed twice, and the gradients are the same, in the number formats that a base
    in bf16 is trained with too."""
    add_lora(model, LoRAConfig(dropout=0, targets=TARGETS))
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "embeddings.lora_A")):
            torch.nn.init.normal_(parameter, std=0.1)
    if low:
        to_bf16(model)
    model.gradient_checkpointing = checkpointing
    whole, wanted = gradients(model)
    rows = {"output": [], "fast_output": []}
    for name, seen in rows.items():
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _module, _args, out, seen=seen: seen.append(len(out)))
    monkeypatch.setattr(loss, "LABEL_CHUNK", 5)
    monkeypatch.setattr(loss, "FRAME_CHUNK", 7)
    pieces, got = gradients(model)
    frames = pieces.codes // 8
    for seen, count, most in ((rows["output"], pieces.tokens, 5), (rows["fast_output"], frames, 7)):
        assert max(seen) <= most < sum(seen) == count
        assert len(seen) == -(-count // most)
    assert pieces.top5 == whole.top5 or low
    for one, other in ((pieces.token, whole.token), (pieces.codebook, whole.codebook)):
        torch.testing.assert_close(one, other, rtol=1e-3 if low else 1e-6, atol=0)
    for name, gradient in wanted.items():
        off = (got[name] - gradient).norm() / gradient.norm()
        assert off < (0.02 if low else 1e-5), name
    with torch.no_grad():
        assert not loss.loss_sums(model, *batch()).token.requires_grad


@pytest.mark.parametrize("part", ["all", "fast_"])
def test_parameters_themselves_learn_from_pieces(model, part, monkeypatch):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part == "all" or name.startswith(part))
    _, wanted = gradients(model)
    monkeypatch.setattr(loss, "LABEL_CHUNK", 5)
    monkeypatch.setattr(loss, "FRAME_CHUNK", 7)
    torch.testing.assert_close(gradients(model)[1], wanted, rtol=1e-3, atol=1e-5)


def test_tied_embeddings_learn_from_pieces(monkeypatch):
    torch.manual_seed(0)
    tied = ModelConfig(
        vocab_size=1436, dim=16, n_layer=1, n_head=2, n_local_heads=1, head_dim=8,
        intermediate_size=24, n_fast_layer=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = DualARTransformer(tied)
    add_lora(model, LoRAConfig(dropout=0))
    torch.nn.init.normal_(model.embeddings.lora_A, std=0.1)
    whole, wanted = gradients(model)
    monkeypatch.setattr(loss, "LABEL_CHUNK", 5)
    pieces, got = gradients(model)
    torch.testing.assert_close(pieces.token, whole.token)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        merge_lora(model)
        merged = loss.loss_sums(model, *batch())
    torch.testing.assert_close(merged.token, whole.token.detach(), rtol=1e-4, atol=0)


def test_batches_of_many_lengths_have_few_sizes_and_the_losses_that_they_have(model):
    tokens, labels = batch()
    parts = [(tokens[:, :, start:], labels[:, :, start:]) for start in range(24)]
    with torch.no_grad():
        exact = [loss.loss_sums(model, *part) for part in parts]
    columns, rows = set(), set()
    model.layers[0].register_forward_hook(lambda _module, _args, out: columns.add(out.shape[1]))
    model.output.register_forward_hook(lambda _module, _args, out: rows.add(len(out)))
    for part, wanted in zip(parts, exact, strict=True):
        with torch.no_grad():
            filled = loss.loss_sums(model, *part, bucketed=True)
        torch.testing.assert_close(filled.totals(), wanted.totals(), rtol=1e-5, atol=0)
    assert len(columns) <= 3
    assert len(rows) <= 6


def to_bf16(model):
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()


def test_the_loss_is_cross_entropy_with_its_gradient():
    torch.manual_seed(0)
    logits = (30 * torch.randn(9, 50)).requires_grad_()
    targets = torch.randint(50, (9,))
    wanted = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    (wanted_gradient,) = torch.autograd.grad(3 * wanted, logits)
    got = loss.cross_entropy(logits * 1, targets)
    (gradient,) = torch.autograd.grad(3 * got, logits)
    torch.testing.assert_close(got, wanted.float())
    torch.testing.assert_close(gradient, wanted_gradient.float(), atol=1e-6, rtol=1e-5)
