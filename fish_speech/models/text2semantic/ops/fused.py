"""What a transformer does between its products, with gradients that keep as little as they can:
what a pass over the memory can compute again is not kept.

The passes themselves are kernels in Triton on a CUDA card (`triton_ops.py`), torch's operations
elsewhere (`torch_ops.py`, whose attention leaves its gradient to torch).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fish_speech.devices import triton_unavailable_reason
from fish_speech.models.text2semantic.ops import torch_ops


def kernels_for(x: Tensor) -> ModuleType | None:
    """`triton_ops`, where its kernels can be compiled: on a CUDA card, the current one."""
    if (
        not x.is_cuda
        or x.get_device() != torch.cuda.current_device()
        or triton_unavailable_reason(x.device)
    ):
        return None
    from fish_speech.models.text2semantic.ops import triton_ops

    return triton_ops


def passes_for(x: Tensor) -> ModuleType:
    """The passes for a tensor: both modules have the same ones."""
    return kernels_for(x) or torch_ops


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x [..., D], in fp32 and cast back before the weight [D]; and x, for
    what goes past it: that gradient is added in the same pass."""
    if weight.requires_grad or x.dtype != weight.dtype:
        return torch_ops.norm(x, weight, eps), x
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return passes_for(x).norm(x.contiguous(), weight, eps), x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, more: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return more, None, None
        x, weight = ctx.saved_tensors
        more = None if more is None else more.contiguous()
        given = gradient.contiguous(), more, x.contiguous(), weight, ctx.eps
        return passes_for(x).norm_slope(*given), None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of contiguous tensors of one shape."""
    return _Gate.apply(gate, up)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return passes_for(gate).gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        return passes_for(gate).gate_slope(gradient, gate, up)[1:]


def turned(qkv: Tensor, rotary: Tensor, heads: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (H + 2h) * d] -> queries [B, T, H, d], keys and values [B, T, h, d], queries and
    keys turned by their positions (see `llama.rotary_table`)."""
    return _Turn.apply(qkv, rotary, heads, local)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rotary: Tensor, heads: int, local: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rotary)
        return passes_for(qkv).turn(qkv.contiguous(), rotary, heads, local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        parts = tuple(gradient.contiguous() for gradient in gradients)
        return passes_for(parts[0]).turn_back(parts, *ctx.saved_tensors), None, None, None


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of many rows of a few columns: queries [R, T, H, d], keys and values
    [R, T, h, d] -> [R, T, H * d]. Attention made for long rows takes several times as long."""
    if kernels_for(q):
        return _Attend.apply(q, k, v)
    return torch_ops.attend(q, k, v).type_as(v)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        return passes_for(parts[0]).attend(*parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return passes_for(gradient).attend_slope(gradient.contiguous(), *ctx.saved_tensors)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of logits [N, V] and targets [N] in fp32, negative ones left out.

    The gradient, asked for once, takes the place of the logits, which nobody else may need;
    torch's function makes three more tensors of that size.
    """
    return _CrossEntropy.apply(logits if kernels_for(logits) else logits.float(), targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, sizes = passes_for(logits).entropy(logits, targets)
        ctx.save_for_backward(logits, targets, sizes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, sizes = ctx.saved_tensors
        passes_for(logits).entropy_slope(logits, targets, sizes, gradient.contiguous())
        torch.autograd.graph.increment_version(logits)  # so that nobody asks again
        return logits, None
