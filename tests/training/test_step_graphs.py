"""Batches as graphs: filled up to a size, they have the losses and gradients of what they are.

What a card captures runs as it is where there is none."""

import pytest
import torch

from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora
from fish_speech.training import loss as loss_module
from fish_speech.training import step_graphs
from fish_speech.training.loss import Places, loss_sums, rounded_up
from fish_speech.training.step_graphs import CaptureError, StepGraphs
from tests.conftest import golden_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def adapted(model):
    model = model.to(DEVICE)
    add_lora(model, LoRAConfig(dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
    return model.train()


def batch(start):
    golden = golden_tensors("train_step.pt")["batch"]
    tokens, labels = (golden[name][:, :, start:].to(DEVICE) for name in ("inputs", "labels"))
    return tokens, Places.of(labels)


def gradients(model, loss):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("most", [5, 1000])
def test_batches_of_about_a_size_share_a_graph_and_learn_what_they_are(adapted, monkeypatch, most):
    for at_once in ("LABELS_AT_ONCE", "FRAMES_AT_ONCE"):  # in pieces, and whole
        monkeypatch.setattr(loss_module, at_once, most)
    graphs, shares = StepGraphs(adapted), torch.tensor([0.01, 0.002], device=DEVICE)
    made = []
    for start in (40, 41, 42, 43):
        tokens, places = batch(start)
        wanted = loss_sums(adapted, tokens, places)
        expected = wanted.token * shares[0] + wanted.codebook * shares[1]
        made.append(graphs(tokens, places, shares))
        if made[-1] is not None:
            loss, sums = made[-1]
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(sums.totals(), wanted.totals())
            slopes = gradients(adapted, 3 * loss), gradients(adapted, 3 * expected)
            torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)
    assert made[0] is None
    assert None not in made[1:]


def test_gradients_of_micro_batches_add_up(adapted):
    """What a graph wrote is read before it runs again."""
    graphs, shares = StepGraphs(adapted), torch.ones(2, device=DEVICE)
    tokens, places = batch(40)
    for _ in range(4):
        made = graphs(tokens, places, shares)
    once = gradients(adapted, made[0])
    for parameter in adapted.parameters():
        parameter.grad = None
    for _ in range(2):
        graphs(tokens, places, shares)[0].backward()
    added = [p.grad for p in adapted.parameters() if p.requires_grad]
    torch.testing.assert_close(added, [2 * slope for slope in once], atol=1e-4, rtol=1e-4)


def test_no_more_graphs_are_made_than_there_is_room_for_and_none_beyond_the_context(
    adapted, monkeypatch
):
    monkeypatch.setattr(step_graphs, "_MOST", 1)
    graphs, shares = StepGraphs(adapted), torch.ones(2, device=DEVICE)
    for start, there in ((40, False), (0, False), (40, True), (0, False), (40, True)):
        assert (graphs(*batch(start), shares) is not None) == there
    monkeypatch.setattr(adapted.config, "max_seq_len", 16)
    assert graphs(*batch(40), shares) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), CaptureError("not so")])
def test_where_no_graph_can_be_made_batches_are_left_to_the_caller(adapted, monkeypatch, error):
    def full(*_):
        raise error

    graphs, shares = StepGraphs(adapted), torch.ones(2, device=DEVICE)
    monkeypatch.setattr(step_graphs, "_captured", full)
    made = [graphs(*batch(40), shares) is None for _ in range(4)]
    assert made == [True, False, True, True]


def test_little_is_filled_up():
    sizes = [rounded_up(size, 4) for size in range(1, 3000)]
    assert all(size <= full <= size * 1.25 + 1 for size, full in enumerate(sizes, 1))
    assert len({full for full in sizes if 128 < full <= 1024}) == 12
