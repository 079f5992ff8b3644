"""The DualAR transformer: a slow one over text and frames, a fast one over the codes of a frame.

Shapes: B batch, T positions, K codebooks, D `dim`, V `vocab_size`, C `codebook_size`, N frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fish_speech.models.text2semantic.config import ModelConfig
from fish_speech.models.text2semantic.layers import (
    Attention,
    Embedding,
    FeedForward,
    Head,
    KeyValueCache,
    Linear,
    RMSNorm,
    TransformerBlock,
    rotary_table,
)


@dataclass
class DualAROutput:
    """`token_logits [B, T, V]`, `codebook_logits [B, T, K, C]` (zeros where no frame follows)."""

    token_logits: Tensor
    codebook_logits: Tensor


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
