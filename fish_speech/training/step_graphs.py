"""A batch's forward and backward as one CUDA graph: thousands of kernels, most of which a card has
done before Python has launched the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.resources import is_out_of_memory
from fish_speech.training.loss import LossSums, Places, filled_up, loss_parts

_log = logging.getLogger(__name__)

_STEPS = 4  # sizes from a power of two to the next: a batch is filled up by 9% on the average
_MOST = 96  # graphs, each a few megabytes


class CaptureError(RuntimeError):
    """A batch could be computed, but not become a graph."""


class StepGraphs:
    """Losses and gradients of one model's batches.

    They are filled up to a few sizes, of which each has a graph. The first batch of a size is left
    to the caller and the third is captured, so that a data set whose batches all differ loses
    nothing. Graphs share memory, which is not that of other work.
    """

    def __init__(self, model: DualARTransformer) -> None:
        self._model = model
        self._seen: set[tuple[int, ...]] = set()
        self._steps: dict[tuple[int, ...], _Step] = {}
        self._shared: _Shared | None = None
        self._works = True

    def __call__(
        self, tokens: Tensor, places: Places, shares: Tensor
    ) -> tuple[Tensor, LossSums] | None:
        """The loss, of which a label of row 0 and a code have `shares` [2], and the sums of a batch
        (see `loss.loss_sums`); None where there is no graph."""
        most, counts = self._model.config.max_seq_len, places.counts
        if not self._works or tokens.shape[2] > most:
            return None
        tokens, places = filled_up(tokens, places, most, _STEPS)
        try:
            step = self._step((len(tokens), tokens.shape[2], len(places.spoken)))
            if step is None:
                return None
            loss, parts = step(tokens, places, shares)
            return loss, LossSums(*parts, *counts)
        except RuntimeError as error:
            if not is_out_of_memory(error) and not isinstance(error, CaptureError):
                raise
            _log.warning("going on without CUDA graphs: %s", str(error).strip().split("\n")[0])
        self._works, self._steps, self._shared = False, {}, None
        return None

    def _step(self, key: tuple[int, ...]) -> _Step | None:
        if key not in self._steps and key in self._seen and len(self._steps) < _MOST:
            self._shared = self._shared or _Shared(self._model)
            self._steps[key] = _Step(self._shared, *key)
        self._seen.add(key)
        return self._steps.get(key)


class _Parts(nn.Module):
    """`loss_parts` as a module, to call it with other parameters."""

    def __init__(self, model: DualARTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        return loss_parts(self.model, tokens, places)


class _Shared:
    """What all graphs of a model write into: gradients and memory; each is read before the next."""

    def __init__(self, model: DualARTransformer) -> None:
        self.model = model
        trained = {f"model.{k}": p for k, p in model.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())
        self.slopes = [torch.zeros_like(p) for p in self.trained]
        # The same memory, but not the same leaves: a loss that somebody still holds would tie those
        # to the stream that it was computed in, which a capture may not touch.
        self._aliases = {key: p.detach().requires_grad_() for key, p in trained.items()}
        self._parts = _Parts(model)
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        # Now, and not again: a graph goes on reading what it was captured with.
        c = model.config
        self._tables = (
            model.rotary_table(c.max_seq_len, c.head_dim),
            model.rotary_table(c.num_codebooks, c.fast_head_dim),
        )

    def run(self, tokens: Tensor, places: Places, shares: Tensor) -> Tensor:
        """Gradients into `slopes`; returns the loss and the three parts of it [4]."""
        given = self._aliases, (tokens, places)
        token, codebook, top5 = torch.func.functional_call(self._parts, *given)
        loss = token * shares[0] + codebook * shares[1]
        leaves = list(self._aliases.values())
        slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
        torch._foreach_copy_(self.slopes, slopes)
        return torch.stack([loss, token, codebook, top5]).detach()


class _Step:
    """One size of batch."""

    def __init__(self, shared: _Shared, items: int, columns: int, size: int) -> None:
        self._shared = shared
        rows, device = shared.model.config.num_codebooks, shared.model.device
        kind = {"dtype": torch.long, "device": device}
        self._tokens = torch.zeros(items, rows + 1, columns, **kind)
        self._places = Places(
            *(torch.zeros(size, **kind) for _ in range(3)), torch.zeros(size, rows, **kind)
        )
        self._shares = torch.zeros(2, device=device)
        self._figures = torch.zeros(4, device=device)  # the loss, and `loss_parts`
        self._play: Callable[[], None] | None = None
        self._warm = False

    def __call__(
        self, tokens: Tensor, places: Places, shares: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and its parts."""
        given = tokens, *places, shares
        for to, part in zip((self._tokens, *self._places, self._shares), given, strict=True):
            to.copy_(part)
        if self._play is None and self._warm:
            self._play = _captured(self._run, self._tokens.device, self._shared.pool)
        (self._play or self._run)()
        self._warm = True
        loss, *parts = self._figures.clone()
        return _Made.apply(loss, self._shared.slopes, *self._shared.trained), parts

    def _run(self) -> None:
        self._figures.copy_(self._shared.run(self._tokens, self._places, self._shares))


class _Made(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, slopes: Sequence[Tensor], *trained: Tensor) -> Tensor:
        ctx.slopes = slopes
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.slopes, gradient)


def _captured(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """What runs as a graph."""
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
