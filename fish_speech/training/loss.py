"""The training loss: row 0 and the codebooks, only where there is a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fish_speech.conversation import IGNORE_INDEX
from fish_speech.models.text2semantic import DualARTransformer
from fish_speech.models.text2semantic.ops.fused import cross_entropy

# At the published size a label's logits of row 0 take 0.4 MB (0.2 where they stay in bf16), and
# what the fast transformer saves of a frame for the backward takes 1 MB in bf16.
LABEL_CHUNK, FRAME_CHUNK = 256, 512
_GPU_CHUNK_FACTOR = 4  # a GPU's kernels need more work at a time to be fast
_BUCKETS = 16, 16  # per power of two, and the least distance between two


def chunk_size(most: int, device: torch.device) -> int:
    """`LABEL_CHUNK` or `FRAME_CHUNK`, as it is on a device."""
    return most * (_GPU_CHUNK_FACTOR if device.type == "cuda" else 1)


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
        """All five [5] (fp32), detached: what `loss_metrics` divides."""
        # Filled in: a GPU would be waited for before they were copied to it.
        counts = [self.token.new_full((), count) for count in (self.tokens, self.codes)]
        sums = [self.token, self.codebook, self.top5.to(self.token.dtype), *counts]
        return torch.stack(sums).detach().float()


def loss_metrics(totals: Tensor | Sequence[float]) -> dict[str, Any]:
    """Mean losses per label and the top-5 accuracy, of added up `LossSums.totals` [5]."""
    token, codebook, top5, tokens, codes = totals
    token, codebook, top5 = token / tokens, codebook / codes, top5 / codes
    return {
        "loss": token + codebook,
        "token_loss": token,
        "codebook_loss": codebook,
        "top5_accuracy": top5,
    }


class LabelPositions(NamedTuple):
    """Where a batch [B, K+1, T] has labels, as positions in [B * T].

    `token_positions` [M] with row 0's `token_labels` [M], `frame_positions` [N] with `code_labels`
    [N, K]. A label of `IGNORE_INDEX` is padding, up to the size of a bucket.
    """

    token_positions: Tensor
    token_labels: Tensor
    frame_positions: Tensor
    code_labels: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor) -> LabelPositions:
        """Of labels [B, K+1, T]."""
        labels = labels.transpose(1, 2).flatten(0, 1)  # [B * T, K+1]
        spoken = (labels[:, 0] != IGNORE_INDEX).nonzero()[:, 0]
        frames = (labels[:, 1:] != IGNORE_INDEX).all(1).nonzero()[:, 0]
        return cls(spoken, labels[spoken, 0], frames, labels[frames, 1:])

    def repadded(self, length: int, padded: int) -> LabelPositions:
        """The same when the batch is padded from `length` to `padded` positions an item."""
        spoken, frames = (
            position + position // length * (padded - length)
            for position in (self.token_positions, self.frame_positions)
        )
        return self._replace(token_positions=spoken, frame_positions=frames)

    @property
    def counts(self) -> tuple[int, int]:
        """How many labels row 0 has, and how many the codebooks."""
        return self.token_labels.numel(), self.code_labels.numel()

    def padded_to(self, size: int) -> LabelPositions:
        """The same with so many token and frame positions."""
        spoken, frames = (size - len(part) for part in (self.token_positions, self.frame_positions))
        return LabelPositions(
            F.pad(self.token_positions, (0, spoken)),
            F.pad(self.token_labels, (0, spoken), value=IGNORE_INDEX),
            F.pad(self.frame_positions, (0, frames)),
            F.pad(self.code_labels, (0, 0, 0, frames), value=IGNORE_INDEX),
        )


def bucket_size(size: int, steps: int, least: int = 1) -> int:
    """Round up to a bucket: there are `steps` from a power of two to the next, at least `least`
    apart."""
    step = max(least, (1 << max(0, size - 1).bit_length()) // (2 * steps))
    return -(-size // step) * step


def pad_to_bucket(
    tokens: Tensor, positions: LabelPositions, most: int, steps: int, least: int = 1
) -> tuple[Tensor, LabelPositions]:
    """A batch padded to buckets: of T, up to `most`, and of the numbers of labels."""
    width = tokens.shape[2]
    padded = max(width, min(bucket_size(width, steps, least), most))
    size = bucket_size(
        max(len(positions.token_positions), len(positions.frame_positions), 1), steps, least
    )
    return F.pad(tokens, (0, padded - width)), positions.repadded(width, padded).padded_to(size)


def loss_sums(
    model: DualARTransformer,
    tokens: Tensor,
    labels: Tensor | LabelPositions,
    *,
    bucketed: bool = False,
) -> LossSums:
    """Losses of tokens and labels [B, K+1, T], padded on the right, or their `LabelPositions`.

    The output layer runs only on positions with a label, the fast transformer only on frames.
    `bucketed` pads many different batches to few shapes: oneDNN compiles its products for each
    shape and keeps them, at the published size a second and 20 MB.
    """
    positions = labels if isinstance(labels, LabelPositions) else LabelPositions.from_labels(labels)
    counts = positions.counts
    if bucketed:
        tokens, positions = pad_to_bucket(tokens, positions, model.config.max_seq_len, *_BUCKETS)
    return LossSums(*loss_parts(model, tokens, positions), *counts)


def loss_parts(
    model: DualARTransformer, tokens: Tensor, positions: LabelPositions
) -> tuple[Tensor, Tensor, Tensor]:
    """`token`, `codebook` and `top5` of `LossSums`; without a synchronisation."""
    x = model.hidden_states(tokens).flatten(0, 1)  # [B * T, D]
    token = token_loss(model, x[positions.token_positions], positions.token_labels)
    return token, *codebook_loss(model, x[positions.frame_positions], positions.code_labels)


def token_loss(model: DualARTransformer, x: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of row 0: hidden states [N, D], labels [N] (or `IGNORE_INDEX`) -> scalar."""
    trained = [*model.norm.parameters(), *model.output_layer.parameters()]
    (loss,) = _chunked_loss(
        lambda x, targets: (cross_entropy(model.token_logits(x), targets),),
        x, targets, LABEL_CHUNK, trained,
    )  # fmt: skip
    return loss


def codebook_loss(model: DualARTransformer, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of hidden states [N, D] before frames and their codes [N, K] (or `IGNORE_INDEX`);
    and how many codes are among the five most likely."""

    def chunk_loss(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        codes, labels = targets.clamp(min=0), targets.flatten()
        logits = model.codebook_logits(x, codes).flatten(0, 1)  # [N * K, C]
        with torch.no_grad():
            # Counting what is ahead of the label is cheaper than sorting.
            label_logits = logits.gather(1, codes.flatten()[:, None])
            likely = (logits > label_logits).sum(1) < 5
            top5 = (likely & (labels != IGNORE_INDEX)).sum()
        return cross_entropy(logits, labels), top5

    trained = [p for name, p in model.named_parameters() if name.startswith("fast_")]
    loss, top5 = _chunked_loss(chunk_loss, x, targets, FRAME_CHUNK, trained)
    return loss, top5


def _chunked_loss(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    x: Tensor,
    targets: Tensor,
    most: int,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """A loss, and counts, of x [N, D] and targets [N, ...], summed over chunks of about one size.

    The gradients, of x and of all trained `parameters` that the function uses, are computed chunk
    by chunk in the forward: the activations of one chunk exist at a time, and nothing is
    recomputed.
    """
    chunks = -(-len(x) // chunk_size(most, x.device))
    if chunks < 2:
        return function(x, targets)
    size = -(-len(x) // chunks)
    trained = [p for p in parameters if p.requires_grad]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *trained))
    return _ChunkedLoss.apply(function, targets, size, needs_grad, x, *trained)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        targets: Tensor,
        size: int,
        needs_grad: bool,
        x: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        sums, grad_x, learns = [], [], ctx.needs_input_grad[4]
        grad_trained = [torch.zeros_like(parameter) for parameter in trained]
        for chunk, labels in zip(x.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(needs_grad):
                chunk = chunk.detach().requires_grad_(learns)
                loss, *counts = function(chunk, labels)
            sums.append([loss.detach(), *counts])
            if needs_grad:
                grads = torch.autograd.grad(loss, (chunk, *trained) if learns else trained)
                grad_x += grads[:learns]
                for sum_, more in zip(grad_trained, grads[learns:], strict=True):
                    sum_ += more
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_x) if learns else None, *grad_trained)
        loss, *counts = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        ctx.mark_non_differentiable(*counts)
        return loss, *counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        grad_x, *grad_trained = ctx.saved_tensors
        grad_x = None if grad_x is None else grad_x * grad_out
        return None, None, None, None, grad_x, *(grad * grad_out for grad in grad_trained)
