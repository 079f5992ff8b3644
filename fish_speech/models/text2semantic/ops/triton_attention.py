"""Causal attention of many rows of a few columns, a frame's codes, as kernels in Triton for a CUDA
card: attention made for long rows takes 64 columns at once. Imported only where they can be
compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product(x, y, WIDE: tl.constexpr):
    if WIDE:  # Triton's interpreter multiplies no bf16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _places(
    T: tl.constexpr, HEADS: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row's queries that share a head of keys, and of these: their columns, where they are,
    and which there are."""
    row, local = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, n, i = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK)
    head = local * (HEADS // LOCAL) + m // T
    query = ((row * T + m % T) * HEADS + head)[:, None] * WIDTH + i[None, :]
    key = ((row * T + n) * LOCAL + local)[:, None] * WIDTH + i[None, :]
    asks = (m < HEADS // LOCAL * T)[:, None] & (i < WIDTH)[None, :]
    return m % T, n, query, key, asks, (n < T)[:, None] & (i < WIDTH)[None, :]


@triton.jit
def _weights(queries, keys, t, n, scale, WIDE: tl.constexpr):
    scores = product(queries, tl.trans(keys), WIDE) * scale
    scores = tl.where(n[None, :] <= t[:, None], scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _attend(
    q, k, v, out, scale, T: tl.constexpr, HEADS: tl.constexpr, LOCAL: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    t, n, query, key, asks, answers = _places(T, HEADS, LOCAL, WIDTH, BLOCK_Q, BLOCK_K, BLOCK)
    queries = tl.load(q + query, mask=asks, other=0.0)
    keys = tl.load(k + key, mask=answers, other=0.0)
    values = tl.load(v + key, mask=answers, other=0.0)
    weights = _weights(queries, keys, t, n, scale, WIDE).to(values.dtype)
    made = product(weights, values, WIDE)
    tl.store(out + query, made.to(out.dtype.element_ty), mask=asks)


@triton.jit
def _attend_slope(
    gradient, q, k, v, to_q, to_k, to_v, scale, T: tl.constexpr, HEADS: tl.constexpr,
    LOCAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t, n, query, key, asks, answers = _places(T, HEADS, LOCAL, WIDTH, BLOCK_Q, BLOCK_K, BLOCK)
    queries = tl.load(q + query, mask=asks, other=0.0)
    keys = tl.load(k + key, mask=answers, other=0.0)
    values = tl.load(v + key, mask=answers, other=0.0)
    slope = tl.load(gradient + query, mask=asks, other=0.0)
    weights = _weights(queries, keys, t, n, scale, WIDE)
    to_weights = product(slope, tl.trans(values), WIDE)
    along = tl.sum(weights * to_weights, 1)[:, None]
    to_scores = (weights * (to_weights - along) * scale).to(keys.dtype)
    made = product(to_scores, keys, WIDE)
    tl.store(to_q + query, made.to(to_q.dtype.element_ty), mask=asks)
    made = product(tl.trans(to_scores), queries, WIDE)
    tl.store(to_k + key, made.to(to_k.dtype.element_ty), mask=answers)
    made = product(tl.trans(weights.to(slope.dtype)), slope, WIDE)
    tl.store(to_v + key, made.to(to_v.dtype.element_ty), mask=answers)


def _launch_attend(kernel: Any, q: Tensor, k: Tensor, *others: Tensor) -> None:
    (rows, length, heads, width), local = q.shape, k.shape[2]
    kernel[rows, local](
        *others, width**-0.5, T=length, HEADS=heads, LOCAL=local, WIDTH=width,
        BLOCK_Q=max(16, triton.next_power_of_2(heads // local * length)),
        BLOCK_K=max(16, triton.next_power_of_2(length)),
        BLOCK=max(16, triton.next_power_of_2(width)), WIDE=not q.is_cuda,
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
    if len(q):
        _launch_attend(_attend, q, k, q, k, v, out)
    return out


def attend_slope(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    slopes = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if len(q):
        _launch_attend(_attend_slope, q, k, gradient, q, k, v, *slopes)
    return slopes
