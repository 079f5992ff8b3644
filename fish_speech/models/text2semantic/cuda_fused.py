"""What a transformer does between its products, each thing in one pass over the memory of a CUDA
card, forward and backward: kernels in Triton. Imported only where they can be compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK, _LOGITS = 1024, 4096  # elements that a program takes at once


@triton.jit
def _norm_forward(x, weight, out, scales, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    gain = tl.load(weight + d, mask=d < D, other=0.0)
    # Rounded before the weight, as it was trained.
    normed = (value * scale).to(gain.dtype).to(tl.float32) * gain.to(tl.float32)
    tl.store(out + row * D + d, normed.to(out.dtype.element_ty), mask=d < D)
    tl.store(scales + row, scale)


@triton.jit
def _norm_backward(gradient, x, weight, scales, out, D: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * D + d
    scale = tl.load(scales + row)
    value = tl.load(x + at, mask=d < D, other=0.0).to(tl.float32) * scale
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    slope = tl.load(gradient + at, mask=d < D, other=0.0).to(tl.float32) * gain
    along = tl.sum(slope * value, 0) / D
    tl.store(out + at, ((slope - value * along) * scale).to(out.dtype.element_ty), mask=d < D)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, dim = x.numel() // x.shape[-1], x.shape[-1]
        out, scales = torch.empty_like(x), torch.empty(rows, device=x.device)
        _norm_forward[(rows,)](
            x, weight, out, scales, eps, D=dim, BLOCK=triton.next_power_of_2(dim)
        )
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        out, dim = torch.empty_like(x), x.shape[-1]
        _norm_backward[(len(scales),)](
            gradient.contiguous(), x, weight, scales, out, D=dim, BLOCK=triton.next_power_of_2(dim)
        )
        return out, None, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [..., D] with a weight [D] that is not trained."""
    return _Norm.apply(x.contiguous(), weight, eps)


@triton.jit
def _gate_forward(gate, up, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    opens = tl.load(gate + at, mask=at < N, other=0.0).to(tl.float32)
    value = opens * tl.sigmoid(opens) * tl.load(up + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < N)


@triton.jit
def _gate_backward(gradient, gate, up, to_gate, to_up, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slope = tl.load(gradient + at, mask=at < N, other=0.0).to(tl.float32)
    opens = tl.load(gate + at, mask=at < N, other=0.0).to(tl.float32)
    value = tl.load(up + at, mask=at < N, other=0.0).to(tl.float32)
    share = tl.sigmoid(opens)
    turned = slope * value * share * (1 + opens * (1 - share))
    tl.store(to_gate + at, turned.to(to_gate.dtype.element_ty), mask=at < N)
    tl.store(to_up + at, (slope * opens * share).to(to_up.dtype.element_ty), mask=at < N)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out, count = torch.empty_like(gate), gate.numel()
        _gate_forward[(triton.cdiv(count, _BLOCK),)](gate, up, out, count, BLOCK=_BLOCK)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        count = gate.numel()
        _gate_backward[(triton.cdiv(count, _BLOCK),)](
            gradient.contiguous(), gate, up, to_gate, to_up, count, BLOCK=_BLOCK
        )
        return to_gate, to_up


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of contiguous tensors of one shape."""
    return _Gate.apply(gate, up)


@triton.jit
def _turn(
    qkv, queries, keys, values, rotary, LENGTH, SINES, HEADS: tl.constexpr, LOCAL: tl.constexpr,
    WIDTH: tl.constexpr, BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A column's queries [H, d], keys and values [h, d] out of qkv [H + 2h, d], turned by rotary
    [2, T, d], whose sines lie so far behind its cosines; `BACK` puts their gradients together,
    turned back."""
    column = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)
    real = (head < HEADS + 2 * LOCAL) & (i < WIDTH)[None, :]
    asks, value = real & (head < HEADS), real & (head >= HEADS + LOCAL)
    key = real & (head >= HEADS) & (head < HEADS + LOCAL)
    joined = qkv + (column * (HEADS + 2 * LOCAL) + head) * WIDTH + i[None, :]
    query = queries + (column * HEADS + head) * WIDTH + i[None, :]
    local = (column * LOCAL + (head - HEADS) % LOCAL) * WIDTH + i[None, :]
    if BACK:
        x = tl.load(query, mask=asks, other=0.0)
        x = tl.where(key, tl.load(keys + local, mask=key, other=0.0), x)
        x = tl.where(value, tl.load(values + local, mask=value, other=0.0), x)
    else:
        x = tl.load(joined, mask=real, other=0.0)
    at = rotary + (column % LENGTH) * WIDTH + i
    cos, sin = tl.load(at, mask=i < WIDTH, other=1.0), tl.load(at + SINES, mask=i < WIDTH)
    if BACK:
        sin = -sin
    first, second = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_H, BLOCK // 2, 2]))
    swapped = tl.reshape(tl.join(second, first), [BLOCK_H, BLOCK])
    turned = (x.to(tl.float32) * cos[None, :] + swapped * sin[None, :]).to(qkv.dtype.element_ty)
    x = tl.where(value, x, turned)
    if BACK:
        tl.store(joined, x, mask=real)
    else:
        tl.store(query, x, mask=asks)
        tl.store(keys + local, x, mask=key)
        tl.store(values + local, x, mask=value)


def _launch_turn(
    qkv: Tensor, parts: tuple[Tensor, ...], rotary: Tensor, heads: int, back: bool
) -> None:
    batch, length = qkv.shape[:2]
    local, size = parts[1].shape[2:]
    _turn[(batch * length,)](
        qkv, *parts, rotary, length, rotary.stride(0), HEADS=heads, LOCAL=local, WIDTH=size,
        BACK=back, BLOCK_H=triton.next_power_of_2(heads + 2 * local),
        BLOCK=triton.next_power_of_2(size), num_warps=2,
    )  # fmt: skip


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rotary: Tensor, heads: int, local: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = qkv.shape[-1] // (heads + 2 * local)
        parts = tuple(qkv.new_empty(*qkv.shape[:2], n, size) for n in (heads, local, local))
        _launch_turn(qkv, parts, rotary, heads, False)
        ctx.save_for_backward(rotary)
        ctx.heads, ctx.shape = heads, qkv.shape
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        out = gradients[0].new_empty(ctx.shape)
        parts = tuple(gradient.contiguous() for gradient in gradients)
        _launch_turn(out, parts, *ctx.saved_tensors, ctx.heads, True)
        return out, None, None, None


def turned(qkv: Tensor, rotary: Tensor, heads: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (H + 2h) * d] -> queries [B, T, H, d], keys and values [B, T, h, d], turned by
    rotary [2, T, d] (see `llama.rotate`)."""
    return _Turn.apply(qkv.contiguous(), rotary, heads, local)


@triton.jit
def _entropy(logits, targets, losses, sizes, V, BLOCK: tl.constexpr):
    """A row's loss, and the logarithm of its sum."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    largest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + v, mask=v < V, other=-float("inf")).to(tl.float32)
        most = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(value - most), 0)
        largest = most
    size = largest + tl.log(total)
    tl.store(losses + row, size - tl.load(logits + row * V + target).to(tl.float32))
    tl.store(sizes + row, size)


@triton.jit
def _entropy_slope(logits, targets, sizes, gradient, V, BLOCK: tl.constexpr):
    """The gradient of the logits, in their place."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * V + v
    value = tl.load(at, mask=v < V, other=0.0).to(tl.float32)
    share = tl.exp(value - tl.load(sizes + row)) - (v == tl.load(targets + row)).to(tl.float32)
    tl.store(at, (share * tl.load(gradient)).to(logits.dtype.element_ty), mask=v < V)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, sizes = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        if len(logits):
            _entropy[(len(logits),)](logits, targets, losses, sizes, logits.shape[1], BLOCK=_LOGITS)
        ctx.save_for_backward(logits, targets, sizes)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, sizes = ctx.saved_tensors
        if len(logits):
            grid = len(logits), triton.cdiv(logits.shape[1], _LOGITS)
            _entropy_slope[grid](
                logits, targets, sizes, gradient.contiguous(), logits.shape[1], BLOCK=_LOGITS
            )
        torch.autograd.graph.increment_version(logits)  # so that nobody asks again
        return logits, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy, in fp32, of logits [N, V] in any format and targets [N]; the gradient,
    asked for once, takes the place of the logits."""
    return _CrossEntropy.apply(logits, targets)
