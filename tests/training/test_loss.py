"""The loss of row 0 in parts of few labels."""

import pytest
import torch

from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora
from fish_speech.training import loss
from tests.conftest import golden_tensors


def gradients(model):
    model.zero_grad()
    batch = golden_tensors("train_step.pt")["batch"]
    torch.manual_seed(0)
    sums = loss.loss_sums(model, batch["inputs"], batch["labels"])
    sums.loss(sums.tokens, sums.codes).backward()
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_in_parts_are_as_all_at_once(model, dtype, monkeypatch):
    add_lora(model, LoRAConfig(dropout=0, targets=("wqkv", "output")))
    model.to(dtype)
    wanted, wanted_gradients = gradients(model)
    rows = []
    model.output.register_forward_hook(lambda _module, _args, out: rows.append(len(out)))
    monkeypatch.setattr(loss, "LABELS_AT_ONCE", 5)
    assert wanted.tokens % 5, "the last part is to be a smaller one"
    sums, got = gradients(model)
    assert max(rows) == 5
    assert sum(rows) == 2 * wanted.tokens  # once more for the gradient
    low = dtype == torch.bfloat16
    torch.testing.assert_close(sums.token, wanted.token, rtol=1e-6, atol=0)
    tolerance = {"rtol": 0.02, "atol": 1e-4} if low else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(got, wanted_gradients, **tolerance)


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
