"""The operations of `fused.py` as kernels in Triton, for a CUDA card. Imported only where they can
be compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fish_speech.models.text2semantic.ops import torch_ops
from fish_speech.models.text2semantic.ops.torch_ops import Update
from fish_speech.models.text2semantic.ops.triton_attention import (
    product,
    short_attention,
    short_attention_backward,
)

__all__ = [
    "cast_lora_factors", "cast_lora_factors_backward", "cross_entropy", "cross_entropy_backward",
    "lora_linear", "lora_silu_mul", "lora_silu_mul_backward", "rms_norm", "rms_norm_backward",
    "rope", "rope_backward", "short_attention", "short_attention_backward", "silu_mul",
    "silu_mul_backward",
]  # fmt: skip

_LOGITS, _COLUMNS, _TILE = 4096, 128, (16, 128)  # elements that a program takes at once


@triton.jit
def _rms_norm(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    gain = tl.load(weight + d, mask=d < D, other=0.0)
    # Rounded before the weight, as it was trained.
    normed = (value * scale).to(gain.dtype).to(tl.float32) * gain.to(tl.float32)
    tl.store(out + row * D + d, normed.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _rms_norm_backward(
    grad_out, residual_grad, x, weight, out, eps, D: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * D + d
    value = tl.load(x + at, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value *= scale
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + at, mask=d < D, other=0.0).to(tl.float32) * gain
    projection = tl.sum(grad * value, 0) / D
    grad = (grad - value * projection) * scale
    if RESIDUAL:
        grad += tl.load(residual_grad + at, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, dim = torch.empty_like(x), x.shape[-1]
    _rms_norm[(x.numel() // dim,)](x, weight, out, eps, D=dim, BLOCK=triton.next_power_of_2(dim))
    return out


def rms_norm_backward(
    grad_out: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Tensor:
    out, dim = torch.empty_like(x), x.shape[-1]
    _rms_norm_backward[(x.numel() // dim,)](
        grad_out, x if residual_grad is None else residual_grad, x, weight, out, eps, D=dim,
        RESIDUAL=residual_grad is not None, BLOCK=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out


@triton.jit
def _tile(N, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's tile of [N, F]: rows, columns, offsets, and a mask of what is within."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * F + column[None, :]
    return row, column, at, (row < N)[:, None] & (column < F)[None, :]


@triton.jit
def _updated(
    x, hidden, lora_up, row, column, at, inside, N, F: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of x [N, F], plus hidden [N, r] times lora_up [r, F] where they are given: in fp32."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RANK:
        r = tl.arange(0, BLOCK)
        mask = r < RANK
        inside = (row < N)[:, None] & mask[None, :]
        left = tl.load(hidden + row[:, None] * RANK + r[None, :], mask=inside, other=0.0)
        inside = mask[:, None] & (column < F)[None, :]
        right = tl.load(lora_up + r[:, None] * F + column[None, :], mask=inside, other=0.0)
        value += product(left, right, UPCAST)
    return value


@triton.jit
def _add(
    x, hidden, lora_up, residual, N, F: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(N, F, ROWS, COLUMNS)
    value = _updated(x, hidden, lora_up, row, column, at, inside, N, F, RANK, BLOCK, UPCAST)
    value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(
    gate, hidden1, lora_up1, up, hidden3, lora_up3, out, N, F: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(N, F, ROWS, COLUMNS)
    gate_value = _updated(
        gate, hidden1, lora_up1, row, column, at, inside, N, F, RANK, BLOCK, UPCAST
    )
    up_value = _updated(up, hidden3, lora_up3, row, column, at, inside, N, F, RANK, BLOCK, UPCAST)
    value = gate_value * tl.sigmoid(gate_value) * up_value
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_backward(
    gate, hidden1, lora_up1, up, hidden3, lora_up3, grad_out, out, grad_up, N, F: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(N, F, ROWS, COLUMNS)
    grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    gate_value = _updated(
        gate, hidden1, lora_up1, row, column, at, inside, N, F, RANK, BLOCK, UPCAST
    )
    up_value = _updated(up, hidden3, lora_up3, row, column, at, inside, N, F, RANK, BLOCK, UPCAST)
    sigmoid = tl.sigmoid(gate_value)
    grad_gate = grad * up_value * sigmoid * (1 + gate_value * (1 - sigmoid))
    tl.store(grad_out + at, grad_gate.to(grad_out.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (grad * gate_value * sigmoid).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(out + at, (up_value * gate_value * sigmoid).to(out.dtype.element_ty), mask=inside)


def _launch_tiles(kernel: Any, x: Tensor, *others: Tensor, rank: int) -> None:
    """Launch a kernel over tiles of x [N, F], its first argument."""
    count, width = x.shape
    if count:
        grid = triton.cdiv(count, _TILE[0]), triton.cdiv(width, _TILE[1])
        kernel[grid](
            x, *others, count, F=width, RANK=rank, ROWS=_TILE[0], COLUMNS=_TILE[1],
            BLOCK=max(16, triton.next_power_of_2(rank)), UPCAST=not x.is_cuda,
        )  # fmt: skip


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    parts = [part.flatten(0, -2) for part in (gate, up, out)]
    none = parts[0], parts[0]
    _launch_tiles(_silu_mul, parts[0], *none, parts[1], *none, parts[2], rank=0)
    return out


def silu_mul_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    parts = [part.flatten(0, -2) for part in (gate, up, grad_out, out, grad_up)]
    none = parts[0], parts[0]
    _launch_tiles(_silu_mul_backward, parts[0], *none, parts[1], *none, *parts[2:], rank=0)
    return out, grad_out, grad_up


def lora_linear(x: Tensor, update: Update, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is None:  # a pass less would round twice, and lose a small update
        return torch_ops.lora_linear(x, update, bias, None)
    weight, hidden, lora_up = update
    out = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    _launch_tiles(_add, out, hidden, lora_up, residual.contiguous(), rank=len(lora_up))
    return out


def lora_silu_mul(x: Tensor, first: Update, second: Update) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (x @ weight.T for weight, *_ in (first, second))
    out, rank = torch.empty_like(gate), len(first[2])
    _launch_tiles(_silu_mul, gate, *first[1:], up, *second[1:], out, rank=rank)
    return out, gate, up


def lora_silu_mul_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, first: Update, second: Update
) -> tuple[Tensor, Tensor, Tensor]:
    out, grad_up, rank = torch.empty_like(gate), torch.empty_like(gate), len(first[2])
    given = gate, *first[1:], up, *second[1:], grad_out
    _launch_tiles(_silu_mul_backward, *given, out, grad_up, rank=rank)
    return out, grad_out, grad_up


@triton.jit
def _rope(
    qkv, queries, keys, values, rotary, LENGTH, SINES, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A column's queries [H, d], keys and values [h, d] out of qkv [H + 2h, d], rotated by rotary
    [2, T, d], whose sines lie `SINES` elements behind its cosines; `BACKWARD` does the reverse with
    their gradients."""
    column = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)
    mask = (head < HEADS + 2 * KV_HEADS) & (i < HEAD_DIM)[None, :]
    q_mask, v_mask = mask & (head < HEADS), mask & (head >= HEADS + KV_HEADS)
    k_mask = mask & (head >= HEADS) & (head < HEADS + KV_HEADS)
    joined = qkv + (column * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + i[None, :]
    query = queries + (column * HEADS + head) * HEAD_DIM + i[None, :]
    local = (column * KV_HEADS + (head - HEADS) % KV_HEADS) * HEAD_DIM + i[None, :]
    if BACKWARD:
        x = tl.load(query, mask=q_mask, other=0.0)
        x = tl.where(k_mask, tl.load(keys + local, mask=k_mask, other=0.0), x)
        x = tl.where(v_mask, tl.load(values + local, mask=v_mask, other=0.0), x)
    else:
        x = tl.load(joined, mask=mask, other=0.0)
    at = rotary + (column % LENGTH) * HEAD_DIM + i
    cos, sin = tl.load(at, mask=i < HEAD_DIM, other=1.0), tl.load(at + SINES, mask=i < HEAD_DIM)
    if BACKWARD:
        sin = -sin
    first, second = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_H, BLOCK // 2, 2]))
    swapped = tl.reshape(tl.join(second, first), [BLOCK_H, BLOCK])
    rotated = (x.to(tl.float32) * cos[None, :] + swapped * sin[None, :]).to(qkv.dtype.element_ty)
    x = tl.where(v_mask, x, rotated)
    if BACKWARD:
        tl.store(joined, x, mask=mask)
    else:
        tl.store(query, x, mask=q_mask)
        tl.store(keys + local, x, mask=k_mask)
        tl.store(values + local, x, mask=v_mask)


def _launch_rope(
    qkv: Tensor, parts: tuple[Tensor, ...], rotary: Tensor, heads: int, backward: bool
) -> None:
    batch, length = qkv.shape[:2]
    local, size = parts[1].shape[2:]
    _rope[(batch * length,)](
        qkv, *parts, rotary, length, rotary.stride(0), HEADS=heads, KV_HEADS=local, HEAD_DIM=size,
        BACKWARD=backward, BLOCK_H=triton.next_power_of_2(heads + 2 * local),
        BLOCK=triton.next_power_of_2(size), num_warps=2,
    )  # fmt: skip


def rope(qkv: Tensor, rotary: Tensor, heads: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    size = qkv.shape[-1] // (heads + 2 * local)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], n, size) for n in (heads, local, local))
    _launch_rope(qkv, (q, k, v), rotary, heads, False)
    return q, k, v


def rope_backward(parts: tuple[Tensor, ...], rotary: Tensor) -> Tensor:
    heads, local, size = parts[0].shape[2], *parts[1].shape[2:]
    out = parts[0].new_empty(*parts[0].shape[:2], (heads + 2 * local) * size)
    _launch_rope(out, parts, rotary, heads, True)
    return out


@triton.jit
def _cast_factors(
    A, B, input_scale, down, up, IN, OUT, RANK: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A times `input_scale`, and B transposed, in the dtype of `down` and `up`; or the gradients
    of A and B from theirs."""
    r, block = tl.arange(0, BLOCK_R), tl.program_id(0)
    first = tl.cdiv(IN, BLOCK)
    if block < first:
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside, at = (r < RANK)[:, None] & (i < IN)[None, :], r[:, None] * IN + i[None, :]
        scale = tl.load(input_scale + i, mask=i < IN, other=0.0)[None, :]
        low, exact = down + at, A + at
    else:
        i = (block - first) * BLOCK + tl.arange(0, BLOCK)
        inside = (r < RANK)[:, None] & (i < OUT)[None, :]
        scale = tl.full([1, BLOCK], 1.0, tl.float32)
        low, exact = up + r[:, None] * OUT + i[None, :], B + i[None, :] * RANK + r[:, None]
    if BACKWARD:
        tl.store(exact, tl.load(low, mask=inside, other=0.0).to(tl.float32) * scale, mask=inside)
    else:
        value = tl.load(exact, mask=inside, other=0.0) * scale
        tl.store(low, value.to(down.dtype.element_ty), mask=inside)


def _launch_cast(
    exact: tuple[Tensor, Tensor], input_scale: Tensor, low: tuple[Tensor, Tensor], backward: bool
) -> None:
    (rank, width), out = low[0].shape, low[1].shape[1]
    grid = (sum(triton.cdiv(size, _COLUMNS) for size in (width, out)),)
    _cast_factors[grid](
        *exact, input_scale, *low, width, out, RANK=rank, BACKWARD=backward,
        BLOCK_R=triton.next_power_of_2(rank), BLOCK=_COLUMNS,
    )  # fmt: skip


def cast_lora_factors(
    A: Tensor, B: Tensor, input_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rank, width = A.shape
    low = A.new_empty(rank, width, dtype=dtype), A.new_empty(rank, len(B), dtype=dtype)
    _launch_cast((A, B), input_scale, low, False)
    return low


def cast_lora_factors_backward(
    grad_down: Tensor, grad_up: Tensor, input_scale: Tensor
) -> tuple[Tensor, Tensor]:
    grads = (
        torch.empty_like(grad_down, dtype=input_scale.dtype),
        input_scale.new_empty(grad_up.T.shape),
    )
    _launch_cast(grads, input_scale, (grad_down, grad_up), True)
    return grads


@triton.jit
def _cross_entropy(logits, targets, losses, lse, V, BLOCK: tl.constexpr):
    """A row's loss, 0 where there is no target, and the log-sum-exp of its logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    largest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + v, mask=v < V, other=-float("inf")).to(tl.float32)
        most = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(value - most), 0)
        largest = most
    row_lse = largest + tl.log(total)
    wanted = tl.load(logits + row * V + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(target >= 0, row_lse - wanted, 0.0))
    tl.store(lse + row, row_lse)


@triton.jit
def _cross_entropy_backward(logits, targets, lse, grad_out, V, BLOCK: tl.constexpr):
    """The gradient of the logits, in their place."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * V + v
    value = tl.load(at, mask=v < V, other=0.0).to(tl.float32)
    target = tl.load(targets + row)
    error = tl.exp(value - tl.load(lse + row)) - (v == target).to(tl.float32)
    grad = tl.where(target >= 0, error * tl.load(grad_out), 0.0)
    tl.store(at, grad.to(logits.dtype.element_ty), mask=v < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, lse = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    if len(logits):
        _cross_entropy[(len(logits),)](logits, targets, losses, lse, logits.shape[1], BLOCK=_LOGITS)
    return losses.sum(), lse


def cross_entropy_backward(logits: Tensor, targets: Tensor, lse: Tensor, grad_out: Tensor) -> None:
    if len(logits):
        grid = len(logits), triton.cdiv(logits.shape[1], _LOGITS)
        _cross_entropy_backward[grid](
            logits, targets, lse, grad_out, logits.shape[1], BLOCK=_LOGITS
        )
