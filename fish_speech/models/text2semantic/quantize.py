"""Weights in fewer bytes: on a CPU a frame costs reading them, so fewer are faster."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.models.text2semantic.llama import DualARTransformer

# From so many columns on (a prompt), multiplying restored weights is faster than the int8 kernel,
# which is made for a column at a time.
_MANY_COLUMNS = 16


class HalfLinear(nn.Module):
    """A linear layer whose weight is fp16, which holds bf16's values exactly but for tiny ones.

    Multiplies in fp32, a column at a time twice as fast as bf16 is multiplied; returns the dtype of
    its input.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return torch.backends.quantized.engine in ("x86", "fbgemm")

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        out = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed).to(x.dtype)
        return out if self.bias is None else out + self.bias


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale for every output channel.

    Multiplies in bf16, for which torch has the kernel; returns the dtype of its input.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantized(linear)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.bfloat16())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        columns = x.bfloat16().flatten(0, -2)
        if len(columns) < _MANY_COLUMNS:
            out = torch._weight_int8pack_mm(columns, self.weight, self.scale)
        else:
            out = F.linear(columns, self.weight.bfloat16()) * self.scale
        out = out.view(*x.shape[:-1], len(self.scale)).to(x.dtype)
        return out if self.bias is None else out + self.bias


class DynamicInt8Linear(nn.Module):
    """The same, with its input in int8 too: a scale for each column, found as it comes.

    Twice as fast as `Int8Linear` where the CPU has instructions for int8 products, and less exact:
    for inputs of about one size, as a norm or attention leaves them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantized(linear)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            # torch is pinned; a later one has other names for this.
            warnings.filterwarnings("ignore", message="torch.quantize_per", category=UserWarning)
            tensor = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(tensor, None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @staticmethod
    def is_native() -> bool:
        """Whether the CPU has the instructions; without them sums would saturate."""
        return HalfLinear.is_native() and bool(torch.cpu.get_capabilities().get("avx512_vnni"))

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        wide = x.float()
        if x.shape[:-1].numel() == 1:
            out = torch.ops.quantized.linear_dynamic(wide, self._packed)
        else:  # the kernel has one scale for all columns: of equal size they share it well
            size = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12)
            out = torch.ops.quantized.linear_dynamic(wide / size, self._packed) * size
        out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias


def pack_half(model: DualARTransformer) -> DualARTransformer:
    """Make the linear layers of a bf16 model on a CPU faster, in place; returns the model.

    Adapters cannot be added to them any more. Any other model, or where there is no kernel, stays
    as it is.
    """
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and HalfLinear.is_native():
        for module, name, linear in _block_linears(model):
            setattr(module, name, HalfLinear(linear))
        model.fast_output = HalfLinear(model.fast_output)
    return model


def quantize_int8(model: DualARTransformer) -> DualARTransformer:
    """Replace the linear layers of both transformers' blocks, in place; returns the model.

    Embeddings and output layers, of which a frame reads a few rows, stay as they are. Raises
    `ValueError` where the model is not on a CPU, the only device that gains from it here.
    """
    if model.device.type != "cpu":
        raise ValueError(f"int8 is for the CPU, not for {model.device.type}; leave it out there")
    native = DynamicInt8Linear.is_native()
    for module, name, linear in _block_linears(model):
        # What SwiGLU multiplies has outliers that would take the precision of the rest.
        kind = DynamicInt8Linear if native and name != "w2" else Int8Linear
        setattr(module, name, kind(linear))
    return model


def _block_linears(model: DualARTransformer) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of both transformers' blocks: the module that holds each, and its name."""
    return [
        (module, name, child)
        for blocks in (model.layers, model.fast_layers)
        for module in blocks.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]


def _quantized(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight [N, K] in int8, and the scale [N] of every output channel."""
    weight = linear.weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return (weight / scale[:, None]).round().to(torch.int8), scale
