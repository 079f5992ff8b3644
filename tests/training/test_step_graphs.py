"""Batches as graphs: filled up to a size, they have the losses and gradients of what they are.

What a card captures runs as it is where there is none."""

import pytest
import torch

from fish_speech.models.text2semantic.lora import LoRAConfig, add_lora
from fish_speech.training import loss as loss_module
from fish_speech.training import step_graphs
from fish_speech.training.loss import LabelPositions, bucket_size, loss_sums
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
    return tokens, LabelPositions.from_labels(labels)


def gradients(model, loss):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("most", [5, 1000])
def test_batches_of_about_a_size_share_a_graph_and_learn_what_they_are(adapted, monkeypatch, most):
    for chunk_size in ("LABEL_CHUNK", "FRAME_CHUNK"):  # in pieces, and whole
        monkeypatch.setattr(loss_module, chunk_size, most)
    graphs, label_weights = StepGraphs(adapted), torch.tensor([0.01, 0.002], device=DEVICE)
    made = []
    for start in (40, 41, 42, 43):
        tokens, positions = batch(start)
        wanted = loss_sums(adapted, tokens, positions)
        expected = wanted.token * label_weights[0] + wanted.codebook * label_weights[1]
        made.append(graphs(tokens, positions, label_weights))
        if made[-1] is not None:
            loss, sums = made[-1]
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(sums.totals(), wanted.totals())
            grads = gradients(adapted, 3 * loss), gradients(adapted, 3 * expected)
            torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert made[0] is None
    assert None not in made[1:]


def test_gradients_of_micro_batches_add_up(adapted):
    """What a graph wrote is read before it runs again."""
    graphs, label_weights = StepGraphs(adapted), torch.ones(2, device=DEVICE)
    tokens, positions = batch(40)
    for _ in range(4):
        made = graphs(tokens, positions, label_weights)
    once = gradients(adapted, made[0])
    for parameter in adapted.parameters():
        parameter.grad = None
    for _ in range(2):
        graphs(tokens, positions, label_weights)[0].backward()
    added = [p.grad for p in adapted.parameters() if p.requires_grad]
    torch.testing.assert_close(added, [2 * grad for grad in once], atol=1e-4, rtol=1e-4)


def test_no_more_graphs_are_made_than_there_is_room_for_and_none_beyond_the_context(
    adapted, monkeypatch
):
    monkeypatch.setattr(step_graphs, "_MAX_GRAPHS", 1)
    graphs, label_weights = StepGraphs(adapted), torch.ones(2, device=DEVICE)
    for start, there in ((40, False), (0, False), (40, True), (0, False), (40, True)):
        assert (graphs(*batch(start), label_weights) is not None) == there
    monkeypatch.setattr(adapted.config, "max_seq_len", 16)
    assert graphs(*batch(40), label_weights) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), CaptureError("not so")])
def test_where_no_graph_can_be_made_batches_are_left_to_the_caller(adapted, monkeypatch, error):
    def full(*_):
        raise error

    graphs, label_weights = StepGraphs(adapted), torch.ones(2, device=DEVICE)
    monkeypatch.setattr(step_graphs, "_capture", full)
    made = [graphs(*batch(40), label_weights) is None for _ in range(4)]
    assert made == [True, False, True, True]


def test_little_is_filled_up():
    sizes = [bucket_size(size, 4) for size in range(1, 3000)]
    assert all(size <= full <= size * 1.25 + 1 for size, full in enumerate(sizes, 1))
    assert len({full for full in sizes if 128 < full <= 1024}) == 12
