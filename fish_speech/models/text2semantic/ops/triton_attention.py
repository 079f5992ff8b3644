"""Causal attention of many short sequences, the codes of a frame, as Triton kernels for a CUDA
card: kernels for long ones work on tiles of 64 positions. Imported only where they compile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product(x, y, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter multiplies no bf16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _offsets(
    T: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the queries that share a key head, and of its keys: positions, offsets in memory, and
    masks of what is within."""
    row, local = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, n, i = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK)
    head = local * (HEADS // KV_HEADS) + m // T
    query = ((row * T + m % T) * HEADS + head)[:, None] * HEAD_DIM + i[None, :]
    key = ((row * T + n) * KV_HEADS + local)[:, None] * HEAD_DIM + i[None, :]
    q_mask = (m < HEADS // KV_HEADS * T)[:, None] & (i < HEAD_DIM)[None, :]
    return m % T, n, query, key, q_mask, (n < T)[:, None] & (i < HEAD_DIM)[None, :]


@triton.jit
def _weights(queries, keys, t, n, scale, UPCAST: tl.constexpr):
    scores = product(queries, tl.trans(keys), UPCAST) * scale
    scores = tl.where(n[None, :] <= t[:, None], scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _short_attention(
    q, k, v, out, scale, T: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    t, n, query, key, q_mask, kv_mask = _offsets(
        T, HEADS, KV_HEADS, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK
    )
    queries = tl.load(q + query, mask=q_mask, other=0.0)
    keys = tl.load(k + key, mask=kv_mask, other=0.0)
    values = tl.load(v + key, mask=kv_mask, other=0.0)
    weights = _weights(queries, keys, t, n, scale, UPCAST).to(values.dtype)
    made = product(weights, values, UPCAST)
    tl.store(out + query, made.to(out.dtype.element_ty), mask=q_mask)


@triton.jit
def _short_attention_backward(
    grad_out, q, k, v, grad_q, grad_k, grad_v, scale, T: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    t, n, query, key, q_mask, kv_mask = _offsets(
        T, HEADS, KV_HEADS, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK
    )
    queries = tl.load(q + query, mask=q_mask, other=0.0)
    keys = tl.load(k + key, mask=kv_mask, other=0.0)
    values = tl.load(v + key, mask=kv_mask, other=0.0)
    grad = tl.load(grad_out + query, mask=q_mask, other=0.0)
    weights = _weights(queries, keys, t, n, scale, UPCAST)
    grad_weights = product(grad, tl.trans(values), UPCAST)
    projection = tl.sum(weights * grad_weights, 1)[:, None]
    grad_scores = (weights * (grad_weights - projection) * scale).to(keys.dtype)
    made = product(grad_scores, keys, UPCAST)
    tl.store(grad_q + query, made.to(grad_q.dtype.element_ty), mask=q_mask)
    made = product(tl.trans(grad_scores), queries, UPCAST)
    tl.store(grad_k + key, made.to(grad_k.dtype.element_ty), mask=kv_mask)
    made = product(tl.trans(weights.to(grad.dtype)), grad, UPCAST)
    tl.store(grad_v + key, made.to(grad_v.dtype.element_ty), mask=kv_mask)


def _launch(kernel: Any, q: Tensor, k: Tensor, *others: Tensor) -> None:
    (rows, length, heads, width), local = q.shape, k.shape[2]
    kernel[rows, local](
        *others, width**-0.5, T=length, HEADS=heads, KV_HEADS=local, HEAD_DIM=width,
        BLOCK_Q=max(16, triton.next_power_of_2(heads // local * length)),
        BLOCK_K=max(16, triton.next_power_of_2(length)),
        BLOCK=max(16, triton.next_power_of_2(width)), UPCAST=not q.is_cuda,
    )  # fmt: skip


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
    if len(q):
        _launch(_short_attention, q, k, q, k, v, out)
    return out


def short_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if len(q):
        _launch(_short_attention_backward, q, k, grad_out, q, k, v, *grads)
    return grads
