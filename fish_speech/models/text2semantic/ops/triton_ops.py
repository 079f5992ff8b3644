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
from fish_speech.models.text2semantic.ops.triton_attention import attend, attend_slope, product

__all__ = [
    "adapted", "adapted_gate", "adapted_gate_slope", "attend", "attend_slope", "entropy",
    "entropy_slope", "gate", "gate_slope", "halves", "halves_back", "norm", "norm_slope", "turn",
    "turn_back",
]  # fmt: skip

_LOGITS, _COLUMNS, _TILE = 4096, 128, (16, 128)  # elements that a program takes at once


@triton.jit
def _norm(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    gain = tl.load(weight + d, mask=d < D, other=0.0)
    # Rounded before the weight, as it was trained.
    normed = (value * scale).to(gain.dtype).to(tl.float32) * gain.to(tl.float32)
    tl.store(out + row * D + d, normed.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _norm_slope(
    gradient, more, x, weight, out, eps, D: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * D + d
    value = tl.load(x + at, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value *= scale
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    slope = tl.load(gradient + at, mask=d < D, other=0.0).to(tl.float32) * gain
    along = tl.sum(slope * value, 0) / D
    slope = (slope - value * along) * scale
    if MORE:
        slope += tl.load(more + at, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=d < D)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, dim = torch.empty_like(x), x.shape[-1]
    _norm[(x.numel() // dim,)](x, weight, out, eps, D=dim, BLOCK=triton.next_power_of_2(dim))
    return out


def norm_slope(
    gradient: Tensor, more: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Tensor:
    out, dim = torch.empty_like(x), x.shape[-1]
    _norm_slope[(x.numel() // dim,)](
        gradient, x if more is None else more, x, weight, out, eps, D=dim, MORE=more is not None,
        BLOCK=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out


@triton.jit
def _tile(N, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's rows and columns of [N, F], where they are, and which there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * F + column[None, :]
    return row, column, at, (row < N)[:, None] & (column < F)[None, :]


@triton.jit
def _updated(
    x, inner, up, row, column, at, inside, N, F: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of x [N, F], plus inner [N, r] times up [r, F] where they are given: in fp32."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RANK:
        r = tl.arange(0, BLOCK)
        real = r < RANK
        inside = (row < N)[:, None] & real[None, :]
        halves = tl.load(inner + row[:, None] * RANK + r[None, :], mask=inside, other=0.0)
        inside = real[:, None] & (column < F)[None, :]
        others = tl.load(up + r[:, None] * F + column[None, :], mask=inside, other=0.0)
        value += product(halves, others, WIDE)
    return value


@triton.jit
def _add(
    x, inner, up, onto, N, F: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(N, F, ROWS, COLUMNS)
    value = _updated(x, inner, up, row, column, at, inside, N, F, RANK, BLOCK, WIDE)
    value += tl.load(onto + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gate(
    gate, inner1, up1, up, inner3, up3, out, N, F: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(N, F, ROWS, COLUMNS)
    opens = _updated(gate, inner1, up1, row, column, at, inside, N, F, RANK, BLOCK, WIDE)
    value = _updated(up, inner3, up3, row, column, at, inside, N, F, RANK, BLOCK, WIDE)
    value *= opens * tl.sigmoid(opens)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_slope(
    gate, inner1, up1, up, inner3, up3, gradient, out, to_up, N, F: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(N, F, ROWS, COLUMNS)
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    opens = _updated(gate, inner1, up1, row, column, at, inside, N, F, RANK, BLOCK, WIDE)
    value = _updated(up, inner3, up3, row, column, at, inside, N, F, RANK, BLOCK, WIDE)
    share = tl.sigmoid(opens)
    turned = slope * value * share * (1 + opens * (1 - share))
    tl.store(gradient + at, turned.to(gradient.dtype.element_ty), mask=inside)
    tl.store(to_up + at, (slope * opens * share).to(to_up.dtype.element_ty), mask=inside)
    tl.store(out + at, (value * opens * share).to(out.dtype.element_ty), mask=inside)


def _launch_tiles(kernel: Any, x: Tensor, *others: Tensor, rank: int) -> None:
    """Launch a kernel over tiles of x [N, F], its first argument."""
    count, width = x.shape
    if count:
        grid = triton.cdiv(count, _TILE[0]), triton.cdiv(width, _TILE[1])
        kernel[grid](
            x, *others, count, F=width, RANK=rank, ROWS=_TILE[0], COLUMNS=_TILE[1],
            BLOCK=max(16, triton.next_power_of_2(rank)), WIDE=not x.is_cuda,
        )  # fmt: skip


def gate(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    parts = [part.flatten(0, -2) for part in (gate, up, out)]
    none = parts[0], parts[0]
    _launch_tiles(_gate, parts[0], *none, parts[1], *none, parts[2], rank=0)
    return out


def gate_slope(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, to_up = torch.empty_like(gate), torch.empty_like(gate)
    parts = [part.flatten(0, -2) for part in (gate, up, gradient, out, to_up)]
    none = parts[0], parts[0]
    _launch_tiles(_gate_slope, parts[0], *none, parts[1], *none, *parts[2:], rank=0)
    return out, gradient, to_up


def adapted(x: Tensor, update: Update, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    if onto is None:  # a pass less would round twice, and lose a small update
        return torch_ops.adapted(x, update, bias, None)
    weight, inner, up = update
    out = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    _launch_tiles(_add, out, inner, up, onto.contiguous(), rank=len(up))
    return out


def adapted_gate(x: Tensor, first: Update, second: Update) -> tuple[Tensor, Tensor, Tensor]:
    opens, up = (x @ weight.T for weight, *_ in (first, second))
    out, rank = torch.empty_like(opens), len(first[2])
    _launch_tiles(_gate, opens, *first[1:], up, *second[1:], out, rank=rank)
    return out, opens, up


def adapted_gate_slope(
    gradient: Tensor, opens: Tensor, up: Tensor, first: Update, second: Update
) -> tuple[Tensor, Tensor, Tensor]:
    out, to_up, rank = torch.empty_like(opens), torch.empty_like(opens), len(first[2])
    _launch_tiles(_gate_slope, opens, *first[1:], up, *second[1:], gradient, out, to_up, rank=rank)
    return out, gradient, to_up


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


def turn(qkv: Tensor, rotary: Tensor, heads: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    size = qkv.shape[-1] // (heads + 2 * local)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], n, size) for n in (heads, local, local))
    _launch_turn(qkv, (q, k, v), rotary, heads, False)
    return q, k, v


def turn_back(parts: tuple[Tensor, ...], rotary: Tensor) -> Tensor:
    heads, local, size = parts[0].shape[2], *parts[1].shape[2:]
    out = parts[0].new_empty(*parts[0].shape[:2], (heads + 2 * local) * size)
    _launch_turn(out, parts, rotary, heads, True)
    return out


@triton.jit
def _halves(
    A, B, keep, down, up, IN, OUT, RANK: tl.constexpr, BACK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of `down` from A's, or of `up` from rows of B; backwards, gradients."""
    r, block = tl.arange(0, BLOCK_R), tl.program_id(0)
    first = tl.cdiv(IN, BLOCK)
    if block < first:
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside, at = (r < RANK)[:, None] & (i < IN)[None, :], r[:, None] * IN + i[None, :]
        scale = tl.load(keep + i, mask=i < IN, other=0.0)[None, :]
        low, exact = down + at, A + at
    else:
        i = (block - first) * BLOCK + tl.arange(0, BLOCK)
        inside = (r < RANK)[:, None] & (i < OUT)[None, :]
        scale = tl.full([1, BLOCK], 1.0, tl.float32)
        low, exact = up + r[:, None] * OUT + i[None, :], B + i[None, :] * RANK + r[:, None]
    if BACK:
        tl.store(exact, tl.load(low, mask=inside, other=0.0).to(tl.float32) * scale, mask=inside)
    else:
        value = tl.load(exact, mask=inside, other=0.0) * scale
        tl.store(low, value.to(down.dtype.element_ty), mask=inside)


def _launch_halves(
    exact: tuple[Tensor, Tensor], keep: Tensor, low: tuple[Tensor, Tensor], back: bool
) -> None:
    (rank, width), out = low[0].shape, low[1].shape[1]
    grid = (sum(triton.cdiv(size, _COLUMNS) for size in (width, out)),)
    _halves[grid](
        *exact, keep, *low, width, out, RANK=rank, BACK=back,
        BLOCK_R=triton.next_power_of_2(rank), BLOCK=_COLUMNS,
    )  # fmt: skip


def halves(A: Tensor, B: Tensor, keep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank, width = A.shape
    low = A.new_empty(rank, width, dtype=dtype), A.new_empty(rank, len(B), dtype=dtype)
    _launch_halves((A, B), keep, low, False)
    return low


def halves_back(to_down: Tensor, to_up: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    slopes = torch.empty_like(to_down, dtype=keep.dtype), keep.new_empty(to_up.T.shape)
    _launch_halves(slopes, keep, (to_down, to_up), True)
    return slopes


@triton.jit
def _entropy(logits, targets, losses, sizes, V, BLOCK: tl.constexpr):
    """A row's loss, 0 where there is no target, and the logarithm of its sum."""
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
    wanted = tl.load(logits + row * V + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(target >= 0, size - wanted, 0.0))
    tl.store(sizes + row, size)


@triton.jit
def _entropy_slope(logits, targets, sizes, gradient, V, BLOCK: tl.constexpr):
    """The gradient of the logits, in their place."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * V + v
    value = tl.load(at, mask=v < V, other=0.0).to(tl.float32)
    target = tl.load(targets + row)
    share = tl.exp(value - tl.load(sizes + row)) - (v == target).to(tl.float32)
    slope = tl.where(target >= 0, share * tl.load(gradient), 0.0)
    tl.store(at, slope.to(logits.dtype.element_ty), mask=v < V)


def entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, sizes = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    if len(logits):
        _entropy[(len(logits),)](logits, targets, losses, sizes, logits.shape[1], BLOCK=_LOGITS)
    return losses.sum(), sizes


def entropy_slope(logits: Tensor, targets: Tensor, sizes: Tensor, gradient: Tensor) -> None:
    if len(logits):
        grid = len(logits), triton.cdiv(logits.shape[1], _LOGITS)
        _entropy_slope[grid](logits, targets, sizes, gradient, logits.shape[1], BLOCK=_LOGITS)
