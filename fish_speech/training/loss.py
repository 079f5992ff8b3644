"""The training loss: row 0 and the codebooks, only where there is a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fish_speech.conversation import IGNORED
from fish_speech.models.text2semantic import DualARTransformer


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


def loss_sums(model: DualARTransformer, tokens: Tensor, labels: Tensor) -> LossSums:
    """Losses of tokens and labels [B, K+1, T], padded on the right.

    The output layer runs only on positions with a label, the fast transformer only on frames.
    """
    x = model.hidden_states(tokens)  # [B, T, D]
    spoken = labels[:, 0] != IGNORED  # [B, T]
    targets = labels[:, 0][spoken]
    token = F.cross_entropy(model.token_logits(x[spoken]).float(), targets, reduction="sum")

    frames = (labels[:, 1:] != IGNORED).all(dim=1)  # [B, T]
    codes = labels[:, 1:].transpose(1, 2)[frames]  # [N, K]
    logits = model.codebook_logits(x[frames], codes).flatten(0, 1).float()  # [N·K, C]
    codes = codes.flatten()
    codebook = F.cross_entropy(logits, codes, reduction="sum")
    with torch.no_grad():
        # Counting what is ahead of the label is cheaper than sorting.
        label_logits = logits.gather(1, codes[:, None])
        top5 = ((logits > label_logits).sum(1) < 5).sum()
    return LossSums(token, codebook, top5, targets.numel(), codes.numel())
