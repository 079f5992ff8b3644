"""The training loss: row 0 and the codebooks, only where there is a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fish_speech.conversation import IGNORED
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.ops.fused import cross_entropy

# At the published size a label's logits of row 0 take 0.4 MB (0.2 where they stay in bf16), and
# what the fast transformer keeps of a frame for its gradient takes 1 MB in bf16.
LABELS_AT_ONCE, FRAMES_AT_ONCE = 256, 512
_MORE = 4  # times as many on a GPU, whose kernels are the slower, the less they have to do
_FILLED = 16, 16  # sizes from a power of two to the next, and how far they are apart at least


def at_once(most: int, device: torch.device) -> int:
    """How many of `LABELS_AT_ONCE` or `FRAMES_AT_ONCE` there are at a time on a device."""
    return most * (_MORE if device.type == "cuda" else 1)


@dataclass
class LossSums:
    """Sums over labels, so that any two batches can be added: `token` over `tokens` labels of
    row 0, `codebook` over `codes` labels of rows 1..K, of which `top5` were among the five most
    likely."""

    token: Tensor
    codebook: Tensor
    top5: Tensor
    tokens: int
    codes: int

    def loss(self, step_tokens: float | Tensor, step_codes: float | Tensor) -> Tensor:
        """This batch's part of the mean over a whole step's labels."""
        return self.token / step_tokens + self.codebook / step_codes

    def totals(self) -> Tensor:
        """All five [5] (fp32), without their history: what `loss_figures` divides."""
        # Filled in: a GPU would be waited for before they were copied to it.
        counts = [self.token.new_full((), count) for count in (self.tokens, self.codes)]
        sums = [self.token, self.codebook, self.top5.to(self.token.dtype), *counts]
        return torch.stack(sums).detach().float()


def loss_figures(totals: Tensor | Sequence[float]) -> dict[str, Any]:
    """Mean losses a label and the top-5 accuracy, of `LossSums.totals` that were added up [5]."""
    token, codebook, top5, tokens, codes = totals
    token, codebook, top5 = token / tokens, codebook / codes, top5 / codes
    return {
        "loss": token + codebook,
        "token_loss": token,
        "codebook_loss": codebook,
        "top5_accuracy": top5,
    }


class Places(NamedTuple):
    """The columns of a batch [B, K+1, T] that are learned, as positions in [B * T].

    `spoken` [M] with its row-0 `ids` [M], `frames` [N] with its `codes` [N, K]. Where both are
    `IGNORED` nothing is learned: that fills a batch up to a size.
    """

    spoken: Tensor
    ids: Tensor
    frames: Tensor
    codes: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Places:
        """Of labels [B, K+1, T]."""
        labels = labels.transpose(1, 2).flatten(0, 1)  # [B * T, K+1]
        spoken = (labels[:, 0] != IGNORED).nonzero()[:, 0]
        frames = (labels[:, 1:] != IGNORED).all(1).nonzero()[:, 0]
        return cls(spoken, labels[spoken, 0], frames, labels[frames, 1:])

    def widened(self, columns: int, wider: int) -> Places:
        """Of a batch of `columns` that was filled up to `wider` ones."""
        spoken, frames = (
            place + place // columns * (wider - columns) for place in (self.spoken, self.frames)
        )
        return self._replace(spoken=spoken, frames=frames)

    @property
    def counts(self) -> tuple[int, int]:
        """Labels of row 0, and codes."""
        return self.ids.numel(), self.codes.numel()

    def filled(self, size: int) -> Places:
        """With so many positions in either."""
        spoken, frames = (size - len(part) for part in (self.spoken, self.frames))
        return Places(
            F.pad(self.spoken, (0, spoken)),
            F.pad(self.ids, (0, spoken), value=IGNORED),
            F.pad(self.frames, (0, frames)),
            F.pad(self.codes, (0, 0, 0, frames), value=IGNORED),
        )


def rounded_up(size: int, steps: int, least: int = 1) -> int:
    """The next of the sizes of which there are so many from a power of two to the next, `least`
    apart at least."""
    step = max(least, (1 << max(0, size - 1).bit_length()) // (2 * steps))
    return -(-size // step) * step


def filled_up(
    tokens: Tensor, places: Places, most: int, steps: int, least: int = 1
) -> tuple[Tensor, Places]:
    """A batch with columns, `most` of them if it hasn't more, and labels of a size as
    `rounded_up` gives."""
    width = tokens.shape[2]
    columns = max(width, min(rounded_up(width, steps, least), most))
    size = rounded_up(max(len(places.spoken), len(places.frames), 1), steps, least)
    return F.pad(tokens, (0, columns - width)), places.widened(width, columns).filled(size)


def loss_sums(
    model: DualARTransformer, tokens: Tensor, labels: Tensor | Places, *, fill_up: bool = False
) -> LossSums:
    """Losses of tokens and labels [B, K+1, T], padded on the right, or their `Places`.

    The output layer runs only on positions with a label, the fast transformer only on frames.
    `fill_up` is for many batches: their sizes are rounded up by some percent, to such as come
    again. What multiplies on a CPU is compiled for every size, and kept: at the published size a
    second and 20 MB.
    """
    places = labels if isinstance(labels, Places) else Places.of(labels)
    counts = places.counts
    if fill_up:
        tokens, places = filled_up(tokens, places, model.config.max_seq_len, *_FILLED)
    return LossSums(*loss_parts(model, tokens, places), *counts)


def loss_parts(
    model: DualARTransformer, tokens: Tensor, places: Places
) -> tuple[Tensor, Tensor, Tensor]:
    """`token`, `codebook` and `top5` of `LossSums`; nothing here waits for a device."""
    x = model.hidden_states(tokens).flatten(0, 1)  # [B * T, D]
    token = token_loss(model, x[places.spoken], places.ids)
    return token, *codebook_loss(model, x[places.frames], places.codes)


def token_loss(model: DualARTransformer, x: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of row 0: hidden states [N, D], labels [N] (or `IGNORED`) -> scalar."""
    output = model.embeddings if model.config.tie_word_embeddings else model.output
    trained = [*model.norm.parameters(), *output.parameters()]
    (loss,) = _in_pieces(
        lambda x, targets: (cross_entropy(model.token_logits(x), targets),),
        x, targets, LABELS_AT_ONCE, trained,
    )  # fmt: skip
    return loss


def codebook_loss(model: DualARTransformer, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of the codes [N, K] (or `IGNORED`) of frames, of hidden states [N, D] before
    each; and how many of them are among the five most likely."""

    def piece(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        codes, labels = targets.clamp(min=0), targets.flatten()
        logits = model.codebook_logits(x, codes).flatten(0, 1)  # [N * K, C]
        with torch.no_grad():
            # Counting what is ahead of the label is cheaper than sorting.
            label_logits = logits.gather(1, codes.flatten()[:, None])
            likely = (logits > label_logits).sum(1) < 5
            top5 = (likely & (labels != IGNORED)).sum()
        return cross_entropy(logits, labels), top5

    trained = [p for name, p in model.named_parameters() if name.startswith("fast_")]
    loss, top5 = _in_pieces(piece, x, targets, FRAMES_AT_ONCE, trained)
    return loss, top5


def _in_pieces(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    x: Tensor,
    targets: Tensor,
    most: int,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """A loss, and counts, of x [N, D] and targets [N, ...], added up over pieces of about a size.

    With each loss its gradients are taken, for x and for the `parameters` that are trained (all
    that the function uses), so that what it is made of exists for one piece at a time, and nothing
    is computed twice.
    """
    pieces = -(-len(x) // at_once(most, x.device))
    if pieces < 2:
        return function(x, targets)
    size = -(-len(x) // pieces)
    trained = [p for p in parameters if p.requires_grad]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *trained))
    return _InPieces.apply(function, targets, size, wanted, x, *trained)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        targets: Tensor,
        size: int,
        wanted: bool,
        x: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        sums, to_x, learns = [], [], ctx.needs_input_grad[4]
        to_trained = [torch.zeros_like(parameter) for parameter in trained]
        for piece, labels in zip(x.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(wanted):
                piece = piece.detach().requires_grad_(learns)
                loss, *counts = function(piece, labels)
            sums.append([loss.detach(), *counts])
            if wanted:
                slopes = torch.autograd.grad(loss, (piece, *trained) if learns else trained)
                to_x += slopes[:learns]
                for sum_, more in zip(to_trained, slopes[learns:], strict=True):
                    sum_ += more
        if wanted:
            ctx.save_for_backward(torch.cat(to_x) if learns else None, *to_trained)
        loss, *counts = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        ctx.mark_non_differentiable(*counts)
        return loss, *counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        to_x, *to_trained = ctx.saved_tensors
        to_x = None if to_x is None else to_x * gradient
        return None, None, None, None, to_x, *(slope * gradient for slope in to_trained)
