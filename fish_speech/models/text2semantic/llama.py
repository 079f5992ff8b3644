"""The DualAR transformer: a slow one over text and frames, a fast one over the codes of a frame.

Shapes: B batch, T columns, K codebooks, D `dim`, V `vocab_size`, C `codebook_size`, N frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fish_speech.devices import supports_gqa
from fish_speech.models.text2semantic.config import ModelConfig
from fish_speech.models.text2semantic.ops.fused import (
    apply_rope,
    rms_norm,
    short_attention,
    silu_mul,
)

_SHORT = 16  # positions: what `short_attention` is for


@dataclass
class DualAROutput:
    """`token_logits [B, T, V]`, `codebook_logits [B, T, K, C]` (zeros where no frame follows)."""

    token_logits: Tensor
    codebook_logits: Tensor


class KeyValueCache:
    """Keys and values of the columns seen so far, for every layer of one transformer.

    Room for `size` columns is taken once, `keys` and `values` [L, B, heads, size, head_dim];
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
        """Hold the first `length` columns of another cache, and nothing else."""
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

    def end(self, columns: int) -> int:
        """Where so many columns behind `length` would end. Raises `IndexError` beyond `size`."""
        end = self.length + columns
        if end > self.size:  # some that write there check nothing
            raise IndexError(f"{end} columns, but the cache holds {self.size}")
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


class DualARTransformer(nn.Module):
    """Fish Speech's language model. Parameter names are those of the published checkpoint."""

    head_type: type[nn.Module] = Head  # of what generates

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.gradient_checkpointing = False
        self.embeddings = Embedding(c.vocab_size, c.dim)
        self.codebook_embeddings = Embedding(c.codebook_size * c.num_codebooks, c.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(
                Attention(
                    c.dim, c.n_head, c.n_local_heads, c.head_dim, c.attention_qkv_bias, layer
                ),
                FeedForward.of_size(c.dim, c.intermediate_size),
                c.dim,
                c.norm_eps,
            )
            for layer in range(c.n_layer)
        )
        self.norm = RMSNorm(c.dim, c.norm_eps)
        if not c.tie_word_embeddings:
            self.output = Linear(c.dim, c.vocab_size, bias=False)
        same = c.fast_dim == c.dim
        self.fast_project_in = nn.Identity() if same else nn.Linear(c.dim, c.fast_dim)
        self.fast_embeddings = Embedding(c.codebook_size, c.fast_dim)
        self.fast_layers = nn.ModuleList(
            TransformerBlock(
                Attention(
                    c.fast_dim,
                    c.fast_n_head,
                    c.fast_n_local_heads,
                    c.fast_head_dim,
                    c.fast_attention_qkv_bias,
                    layer,
                ),
                FeedForward.of_size(c.fast_dim, c.fast_intermediate_size),
                c.fast_dim,
                c.norm_eps,
            )
            for layer in range(c.n_fast_layer)
        )
        self.fast_norm = RMSNorm(c.fast_dim, c.norm_eps)
        self.fast_output = Linear(c.fast_dim, c.codebook_size, bias=False)
        # Set when the tokenizer is known (`load_model`): which ids of row 0 are frames.
        self.semantic_begin_id = c.vocab_size - c.codebook_size
        self._rotary: dict[tuple, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of the weights where they are not packed."""
        return self.norm.weight.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the weights as they were loaded, packed or not."""
        return self.embeddings.weight.dtype

    @property
    def output_layer(self) -> nn.Module:
        """What gives row 0's logits."""
        return self.embeddings if self.config.tie_word_embeddings else self.output

    def set_dropout(self, p: float) -> None:
        """Dropout of the attention weights while training."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.dropout = p

    def is_frame(self, ids: Tensor) -> Tensor:
        """Where row-0 ids are semantic tokens."""
        begin = self.semantic_begin_id
        return (ids >= begin) & (ids < begin + self.config.codebook_size)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> DualAROutput:
        """Logits at every position, in upstream's shape (training computes far fewer).

        `tokens [B, K+1, T]`; `key_padding_mask [B, T]` is True at padding. The codebook logits at
        t are those of the frame at t + 1, whose codes are read from `tokens`.
        """
        x = self.hidden_states(tokens, key_padding_mask)  # [B, T, D]
        follows = F.pad(self.is_frame(tokens[:, 0, 1:]), (0, 1))  # [B, T]
        codes = F.pad(tokens[:, 1:, 1:], (0, 1)).transpose(1, 2)  # [B, T, K]
        logits = self.codebook_logits(x[follows], codes[follows])  # [N, K, C]
        codebook_logits = logits.new_zeros(*follows.shape, *logits.shape[1:])
        codebook_logits[follows] = logits
        return DualAROutput(self.token_logits(x), codebook_logits)

    def hidden_states(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The slow transformer without its last norm: tokens [B, K+1, T] -> [B, T, D].

        Padding on the right needs no mask: causal attention never looks there. With a cache the
        tokens continue what it holds.
        """
        if key_padding_mask is not None and cache is not None:
            raise ValueError("a padding mask and a cache exclude each other")
        x = self.embed(tokens)
        start = cache.length if cache is not None else 0
        rotary = self.rotary_table(start + x.shape[1], self.config.head_dim)[:, start:]
        mask = _attention_mask(start, x.shape[1], key_padding_mask, x.device)
        return self._run(self.layers, x, rotary, mask, cache)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, K+1, T] -> [B, T, D]: the codes are added only where row 0 is a frame."""
        ids, codes = tokens[:, 0], tokens[:, 1:]
        offsets = torch.arange(self.config.num_codebooks, device=tokens.device)[:, None]
        codes = self.codebook_embeddings(codes + offsets * self.config.codebook_size)
        return self.embeddings(ids) + codes.sum(1) * self.is_frame(ids)[..., None]

    def token_logits(self, x: Tensor) -> Tensor:
        """Row-0 logits of hidden states: [..., D] -> [..., V]."""
        x = self.norm(x).to(self.stored_dtype)
        tied = self.config.tie_word_embeddings
        return self.embeddings.logits(x) if tied else self.output(x)

    def codebook_logits(self, x: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits of frames: x [N, D] before each, its codes [N, K] -> [N, K, C]."""
        x = torch.cat(
            [self.fast_project_in(x)[:, None], self.fast_embeddings(codes[:, :-1])], dim=1
        )  # [N, K, fast D]
        return self.fast_logits(x)

    def fast_logits(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The fast transformer: x [N, k, fast D], continuing the cache -> [N, k, C]."""
        start = cache.length if cache is not None else 0
        rotary = self.rotary_table(self.config.num_codebooks, self.config.fast_head_dim)
        rotary = rotary[:, start : start + x.shape[1]]
        x = self._run(self.fast_layers, x, rotary, None, cache)
        return self.fast_output(self.fast_norm(x))

    def new_cache(self, size: int, batch: int = 1) -> KeyValueCache:
        """A cache for `size` columns of the slow transformer."""
        c = self.config
        shape = (batch, c.n_local_heads, size, c.head_dim)
        return KeyValueCache(c.n_layer, shape, device=self.device, dtype=self.dtype)

    def new_fast_cache(self, batch: int = 1) -> KeyValueCache:
        """A cache for one frame; set its `length` to 0 to use it for the next."""
        c = self.config
        shape = (batch, c.fast_n_local_heads, c.num_codebooks, c.fast_head_dim)
        return KeyValueCache(c.n_fast_layer, shape, device=self.device, dtype=self.dtype)

    def _run(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        for layer in layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return x

    def rotary_table(self, length: int, head_dim: int) -> Tensor:
        key = (head_dim, self.device)
        table = self._rotary.get(key)
        if table is None or table.shape[1] < length:
            size = 1 << (length - 1).bit_length()
            # A table first made while generating must serve training too.
            with torch.inference_mode(False):
                table = rotary_table(size, head_dim, self.config.rope_base, self.device)
            self._rotary[key] = table  # which another thread may replace by a shorter one
        return table[:, :length]


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


def _attention_mask(
    start: int, length: int, key_padding_mask: Tensor | None, device
) -> Tensor | None:
    """None where plain causal attention from position 0, or of a single query, is meant."""
    if key_padding_mask is None and (start == 0 or length == 1):
        return None
    mask = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
    if key_padding_mask is None:
        return mask
    return mask & ~key_padding_mask[:, None, None, :]
