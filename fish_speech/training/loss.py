"""The training loss: row 0 and the codebooks, only where there is a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fish_speech.conversation import IGNORED
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.passes import cross_entropy

# Of row 0, whose logits take 0.4 MB a label at the published size (0.2 where they stay in bf16).
LABELS_AT_ONCE = 256
_MORE = 4  # times as many on a GPU, which would wait for more launches


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

    def filled(self, size: int) -> Places:
        """With so many positions in either."""
        spoken, frames = (size - len(part) for part in (self.spoken, self.frames))
        return Places(
            F.pad(self.spoken, (0, spoken)),
            F.pad(self.ids, (0, spoken), value=IGNORED),
            F.pad(self.frames, (0, frames)),
            F.pad(self.codes, (0, 0, 0, frames), value=IGNORED),
        )


def loss_sums(model: DualARTransformer, tokens: Tensor, labels: Tensor | Places) -> LossSums:
    """Losses of tokens and labels [B, K+1, T], padded on the right, or their `Places`.

    The output layer runs only on positions with a label, the fast transformer only on frames.
    """
    places = labels if isinstance(labels, Places) else Places.of(labels)
    return LossSums(*loss_parts(model, tokens, places), places.ids.numel(), places.codes.numel())


def loss_parts(
    model: DualARTransformer, tokens: Tensor, places: Places
) -> tuple[Tensor, Tensor, Tensor]:
    """`token`, `codebook` and `top5` of `LossSums`; nothing here waits for a device."""
    x = model.hidden_states(tokens).flatten(0, 1)  # [B * T, D]
    token = token_loss(model, x[places.spoken], places.ids)

    codes, labels = places.codes.clamp(min=0), places.codes.flatten()
    logits = model.codebook_logits(x[places.frames], codes).flatten(0, 1)  # [N·K, C]
    with torch.no_grad():
        # Counting what is ahead of the label is cheaper than sorting.
        label_logits = logits.gather(1, codes.flatten()[:, None])
        likely = (logits > label_logits).sum(1) < 5
        top5 = (likely & (labels != IGNORED)).sum()
    return token, cross_entropy(logits, labels), top5


def token_loss(model: DualARTransformer, x: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of row 0: hidden states [N, D], labels [N] (or `IGNORED`) -> scalar.

    Of many labels a part at a time has logits. Their gradients are taken at once, so that none are
    kept, or computed twice.
    """
    most = LABELS_AT_ONCE * (_MORE if x.is_cuda else 1)
    if len(targets) <= most:
        return cross_entropy(model.token_logits(x), targets)
    output = model.embeddings if model.config.tie_word_embeddings else model.output
    trained = [p for m in (model.norm, output) for p in m.parameters() if p.requires_grad]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *trained))
    return _TokenLoss.apply(model, targets, most, wanted, x, *trained)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        model: DualARTransformer,
        targets: Tensor,
        most: int,
        wanted: bool,
        x: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total, to_x = x.new_zeros((), dtype=torch.float32), []
        to_trained = [torch.zeros_like(parameter) for parameter in trained]
        pieces = zip(x.split(most), targets.split(most), strict=True)
        for piece, labels in pieces:
            with torch.set_grad_enabled(wanted):
                piece = piece.detach().requires_grad_(wanted)
                loss = cross_entropy(model.token_logits(piece), labels)
            total += loss.detach()
            if wanted:
                slope, *slopes = torch.autograd.grad(loss, (piece, *trained))
                to_x.append(slope)
                for sum_, more in zip(to_trained, slopes, strict=True):
                    sum_ += more
        if wanted:
            ctx.save_for_backward(torch.cat(to_x), *to_trained)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return None, None, None, None, *(slope * gradient for slope in ctx.saved_tensors)
