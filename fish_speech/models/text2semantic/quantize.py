"""Weight-only int8: on a CPU a frame costs reading the weights, so fewer bytes are faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.models.text2semantic.llama import DualARTransformer

# From so many columns on (a prompt), multiplying restored weights is faster than the int8 kernel,
# which is made for a column at a time.
_MANY_COLUMNS = 16


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale for every output channel.

    Multiplies in bf16, for which torch has the kernel; returns the dtype of its input.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))  # [N, K]
        self.register_buffer("scale", scale.bfloat16())  # [N]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        columns = x.bfloat16().flatten(0, -2)
        if len(columns) < _MANY_COLUMNS:
            out = torch._weight_int8pack_mm(columns, self.weight, self.scale)
        else:
            out = F.linear(columns, self.weight.bfloat16()) * self.scale
        out = out.view(*x.shape[:-1], len(self.scale)).to(x.dtype)
        return out if self.bias is None else out + self.bias


def quantize_int8(model: DualARTransformer) -> DualARTransformer:
    """Replace the linear layers of both transformers' blocks, in place; returns the model.

    Embeddings and output layers, of which a frame reads a few rows, stay as they are. Raises
    `ValueError` where the model is not on a CPU, the only device that gains from it here.
    """
    if model.device.type != "cpu":
        raise ValueError(f"int8 is for the CPU, not for {model.device.type}; leave it out there")
    for blocks in (model.layers, model.fast_layers):
        for module in list(blocks.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return model
