"""CUDA graphs of a batch's forward and backward: thousands of kernels, most of which a GPU has done
before Python has launched the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.resources import is_out_of_memory
from fish_speech.training.loss import LabelPositions, LossSums, loss_parts, pad_to_bucket

_log = logging.getLogger(__name__)

_BUCKETS = 4  # shapes per power of two: padding is 9% on the average
_MAX_GRAPHS = 96  # graphs, each a few megabytes


class CaptureError(RuntimeError):
    """A batch could be computed, but not become a graph."""


class StepGraphs:
    """Losses and gradients of one model's batches, by one graph for each shape.

    Batches are padded to a few shapes. Of each the first batch is left to the caller, the second
    is the warm-up and the third is captured, so that a dataset whose batches all differ loses
    nothing. The graphs share a memory pool of their own.
    """

    def __init__(self, model: DualARTransformer) -> None:
        self._model = model
        self._seen: set[tuple[int, ...]] = set()
        self._steps: dict[tuple[int, ...], _CapturedStep] = {}
        self._shared: _SharedMemory | None = None
        self._works = True

    def __call__(
        self, tokens: Tensor, positions: LabelPositions, label_weights: Tensor
    ) -> tuple[Tensor, LossSums] | None:
        """The loss of a batch, with the weights [2] of a label of row 0 and of a code in it, and
        its sums (see `loss.loss_sums`); None where there is no graph."""
        most, counts = self._model.config.max_seq_len, positions.counts
        if not self._works or tokens.shape[2] > most:
            return None
        tokens, positions = pad_to_bucket(tokens, positions, most, _BUCKETS)
        try:
            step = self._step((len(tokens), tokens.shape[2], len(positions.token_positions)))
            if step is None:
                return None
            loss, parts = step(tokens, positions, label_weights)
            return loss, LossSums(*parts, *counts)
        except RuntimeError as error:
            if not is_out_of_memory(error) and not isinstance(error, CaptureError):
                raise
            _log.warning("going on without CUDA graphs: %s", str(error).strip().split("\n")[0])
        self._works, self._steps, self._shared = False, {}, None
        return None

    def _step(self, key: tuple[int, ...]) -> _CapturedStep | None:
        if key not in self._steps and key in self._seen and len(self._steps) < _MAX_GRAPHS:
            self._shared = self._shared or _SharedMemory(self._model)
            self._steps[key] = _CapturedStep(self._shared, *key)
        self._seen.add(key)
        return self._steps.get(key)


class _LossModule(nn.Module):
    """`loss_parts` as a module, to call it with other parameters."""

    def __init__(self, model: DualARTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: LabelPositions) -> tuple[Tensor, Tensor, Tensor]:
        return loss_parts(self.model, tokens, positions)


class _SharedMemory:
    """Gradients and memory that all graphs of a model write; each is read before the next runs."""

    def __init__(self, model: DualARTransformer) -> None:
        self.model = model
        trained = {f"model.{k}": p for k, p in model.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())
        self.grads = [torch.zeros_like(p) for p in self.trained]
        # The same memory, but other leaves: a loss that is still alive ties its leaves to the
        # stream that it was computed in, which a capture may not touch.
        self._aliases = {key: p.detach().requires_grad_() for key, p in trained.items()}
        self._parts = _LossModule(model)
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        # Now, and not again: a graph goes on reading what it was captured with.
        c = model.config
        self._tables = (
            model.rotary_table(c.max_seq_len, c.head_dim),
            model.rotary_table(c.num_codebooks, c.fast_head_dim),
        )

    def run(self, tokens: Tensor, positions: LabelPositions, label_weights: Tensor) -> Tensor:
        """Gradients into `grads`; returns the loss and the three parts of it [4]."""
        given = self._aliases, (tokens, positions)
        token, codebook, top5 = torch.func.functional_call(self._parts, *given)
        loss = token * label_weights[0] + codebook * label_weights[1]
        leaves = list(self._aliases.values())
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        torch._foreach_copy_(self.grads, grads)
        return torch.stack([loss, token, codebook, top5]).detach()


class _CapturedStep:
    """One shape of batch."""

    def __init__(self, shared: _SharedMemory, items: int, length: int, size: int) -> None:
        self._shared = shared
        rows, device = shared.model.config.num_codebooks, shared.model.device
        kind = {"dtype": torch.long, "device": device}
        self._tokens = torch.zeros(items, rows + 1, length, **kind)
        self._positions = LabelPositions(
            *(torch.zeros(size, **kind) for _ in range(3)), torch.zeros(size, rows, **kind)
        )
        self._label_weights = torch.zeros(2, device=device)
        self._losses = torch.zeros(4, device=device)  # the loss, and `loss_parts`
        self._replay: Callable[[], None] | None = None
        self._warmed_up = False

    def __call__(
        self, tokens: Tensor, positions: LabelPositions, label_weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and its parts."""
        given = tokens, *positions, label_weights
        for to, part in zip(
            (self._tokens, *self._positions, self._label_weights), given, strict=True
        ):
            to.copy_(part)
        if self._replay is None and self._warmed_up:
            self._replay = _capture(self._run, self._tokens.device, self._shared.pool)
        (self._replay or self._run)()
        self._warmed_up = True
        loss, *parts = self._losses.clone()
        return _PrecomputedGradients.apply(loss, self._shared.grads, *self._shared.trained), parts

    def _run(self) -> None:
        self._losses.copy_(self._shared.run(self._tokens, self._positions, self._label_weights))


class _PrecomputedGradients(torch.autograd.Function):
    """A loss whose gradients are computed already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Sequence[Tensor], *trained: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.grads, grad_out)


def _capture(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Capture a function; what is returned replays it."""
    if device.type != "cuda":  # in tests
        return run
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # which a capture that fails does not bring back
        raise CaptureError(str(error)) from error
    return graph.replay
