"""The layers of the DualAR transformer's two stacks.

Shapes: B batch, T positions, D `dim`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.devices import supports_gqa
from fish_speech.models.text2semantic.ops.fused import (
    apply_rope,
    rms_norm,
    short_attention,
    silu_mul,
)

_SHORT = 16  # positions: what `short_attention` is for


class KeyValueCache:
    """Keys and values of the positions seen so far, for every layer of one transformer.

    Room for `size` positions is taken once, `keys` and `values` [L, B, heads, size, head_dim];
    attention reads a view of the `length` filled ones.
    """

    def __init__(
        self, n_layer: int, shape: tuple[int, int, int, int], *, device, dtype: torch.dtype
    ) -> None:
        """`shape` is (batch, key/value heads, size, head_dim)."""
        self.size = shape[2]
        self.length = 0
        self.keys, self.values = (
            torch.empty(n_layer, *shape, device=device, dtype=dtype) for _ in range(2)
        )

    def copy_prefix(self, other: KeyValueCache, length: int) -> None:
        """Hold the first `length` positions of another cache, and nothing else."""
        self.keys[..., :length, :] = other.keys[..., :length, :]
        self.values[..., :length, :] = other.values[..., :length, :]
        self.length = length

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, heads, T, head_dim] behind `length`; returns all of the layer's so far."""
        end = self.end(keys.shape[2])
        all_keys, all_values = self.keys[layer], self.values[layer]
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def end(self, count: int) -> int:
        """Where so many positions behind `length` would end. Raises `IndexError` beyond `size`."""
        end = self.length + count
        if end > self.size:  # some that write there check nothing
            raise IndexError(f"{end} positions, but the cache holds {self.size}")
        return end


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and cast back before the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return self.with_residual(x)[0]

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x [..., D], and x for the residual branch."""
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer whose output may be added to a residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [..., D]
        out = super().forward(x)
        return out if residual is None else residual + out


class Embedding(nn.Embedding):
    """An embedding that may be the output layer, too."""

    def logits(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return F.linear(x, self.weight)


class FeedForward(nn.Module):
    """SwiGLU feed-forward: residual + w2(silu(w1(x)) * w3(x))."""

    def __init__(self, w1: Linear, w3: Linear, w2: Linear) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = w1, w3, w2

    @classmethod
    def of_size(cls, dim: int, intermediate_size: int) -> FeedForward:
        w1, w3 = (Linear(dim, intermediate_size, bias=False) for _ in range(2))
        return cls(w1, w3, Linear(intermediate_size, dim, bias=False))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # [..., D]
        return self.w2(silu_mul(self.w1(x), self.w3(x)), residual)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(
        self, dim: int, n_head: int, n_local_heads: int, head_dim: int, bias: bool, layer: int
    ) -> None:
        super().__init__()
        self.n_head, self.n_local_heads, self.head_dim = n_head, n_local_heads, head_dim
        self.layer = layer
        self.dropout = 0.0
        self.wqkv = Linear(dim, (n_head + 2 * n_local_heads) * head_dim, bias=bias)
        self.wo = Linear(n_head * head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """residual + attention of x, both [B, T, D]; rotary [2, T, head_dim]; mask is True where a
        key may be seen."""
        return self.wo(self.attend(self.wqkv(x), rotary, mask, cache), residual)

    def attend(
        self, qkv: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Queries, keys and values [B, T, (heads + 2 local heads) * head_dim] -> [B, T, D]."""
        length = qkv.shape[1]
        dropout = self.dropout if self.training else 0.0
        parts = apply_rope(qkv, rotary, self.n_head, self.n_local_heads)
        if cache is None and mask is None and 1 < length <= _SHORT and not dropout:
            return short_attention(*parts)
        q, k, v = (part.transpose(1, 2) for part in parts)  # [B, heads, T, head_dim]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if length == 1 and mask is None:
            # Of a single position, heads that share a key are as good as positions of one head.
            q = q.view(*k.shape[:2], -1, self.head_dim)
        elif q.shape[1] != k.shape[1] and not supports_gqa(q.device, q.dtype, mask is not None):
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        ).reshape(len(qkv), self.n_head, length, self.head_dim)  # some kernels answer transposed
        return out.transpose(1, 2).flatten(2)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, attention: Attention, feed_forward: FeedForward, dim: int, eps: float):
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        h = self.attention(*self.attention_norm.with_residual(x), rotary, mask, cache)
        return self.feed_forward(*self.ffn_norm.with_residual(h))


class Head(nn.Module):
    """The last norm, and rows of an output layer: [..., D] -> [..., N]."""

    def __init__(self, norm: RMSNorm, weight: Tensor) -> None:
        super().__init__()
        self.norm, self.weight = norm, weight.to(norm.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.weight)


def rotary_table(length: int, head_dim: int, base: float, device) -> Tensor:
    """cos, and sin with the sign it has in `torch_ops.rotate`, of every position: [2, length,
    head_dim] in fp32.

    The published weights were trained with a table rounded to bf16, so it is rounded here.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponents)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)])
    return table.flatten(-2).bfloat16().float()
