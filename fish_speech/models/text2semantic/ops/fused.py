"""Fused operations between the matrix products, as autograd functions that save little: what one
pass over the memory can recompute in the backward is not kept.

They run as Triton kernels on a CUDA card (`triton_ops.py`), else as torch's operations
(`torch_ops.py`). Both modules have the same functions.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fish_speech.devices import triton_unavailable_reason
from fish_speech.models.text2semantic.ops import torch_ops


def triton_ops_for(x: Tensor) -> ModuleType | None:
    """`triton_ops`, where its kernels can be compiled: on a CUDA card, the current one."""
    if (
        not x.is_cuda
        or x.get_device() != torch.cuda.current_device()
        or triton_unavailable_reason(x.device)
    ):
        return None
    from fish_speech.models.text2semantic.ops import triton_ops

    return triton_ops


def ops_for(x: Tensor) -> ModuleType:
    """The module whose functions are for a tensor's device."""
    return triton_ops_for(x) or torch_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x [..., D], in fp32 and cast back before the weight [D]; and x for
    the residual branch, whose gradient is then added in the same pass."""
    if weight.requires_grad or x.dtype != weight.dtype:
        return torch_ops.rms_norm(x, weight, eps), x
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return ops_for(x).rms_norm(x.contiguous(), weight, eps), x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, residual_grad: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if grad_out is None:
            return residual_grad, None, None
        x, weight = ctx.saved_tensors
        residual_grad = None if residual_grad is None else residual_grad.contiguous()
        given = grad_out.contiguous(), residual_grad, x.contiguous(), weight, ctx.eps
        return ops_for(x).rms_norm_backward(*given), None, None


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of contiguous tensors of one shape."""
    return _SiluMul.apply(gate, up)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return ops_for(gate).silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
        return ops_for(gate).silu_mul_backward(grad_out, gate, up)[1:]


def apply_rope(
    qkv: Tensor, rotary: Tensor, heads: int, local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (H + 2h) * d] -> queries [B, T, H, d], keys and values [B, T, h, d], queries and
    keys rotated by their positions (see `layers.rotary_table`)."""
    return _Rope.apply(qkv, rotary, heads, local)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rotary: Tensor, heads: int, local: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rotary)
        return ops_for(qkv).rope(qkv.contiguous(), rotary, heads, local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        parts = tuple(grad.contiguous() for grad in grads)
        return ops_for(parts[0]).rope_backward(parts, *ctx.saved_tensors), None, None, None


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of many short sequences: queries [R, T, H, d], keys and values [R, T, h, d]
    -> [R, T, H * d]. Kernels for long sequences take several times as long."""
    if triton_ops_for(q):
        return _ShortAttention.apply(q, k, v)
    return torch_ops.short_attention(q, k, v).type_as(v)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        return ops_for(parts[0]).short_attention(*parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops_for(grad_out).short_attention_backward(grad_out.contiguous(), *ctx.saved_tensors)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of logits [N, V] and targets [N] in fp32, negative ones left out.

    The gradient is written over the logits, so nothing else may use them, and it can be taken
    once; torch's function makes three more tensors of that size.
    """
    return _CrossEntropy.apply(logits if triton_ops_for(logits) else logits.float(), targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, lse = ops_for(logits).cross_entropy(logits, targets)
        ctx.save_for_backward(logits, targets, lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        ops_for(logits).cross_entropy_backward(logits, targets, lse, grad_out.contiguous())
        torch.autograd.graph.increment_version(logits)  # so that a second backward fails
        return logits, None
