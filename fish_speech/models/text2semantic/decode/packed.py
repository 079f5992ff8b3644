"""A transformer whose weights are packed for decoding on a CPU.

A decoding step costs reading every weight once, so fewer bytes are faster. Activations are fp32
whatever the weights are: they cost nothing, and casting them does. One or a few positions go
through compiled kernels (`cpu_kernels.py`, imported only where it is needed: numba takes a while).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.devices import has_native_int8
from fish_speech.models.text2semantic.layers import KeyValueCache, RMSNorm, TransformerBlock
from fish_speech.models.text2semantic.llama import DualARTransformer
from fish_speech.resources import trim_malloc

_MAX_DECODE_POSITIONS = 4  # more are faster as matrix products
_INT8_MAX = 127  # of each of the two parts of an input, see `_int8_product`


class PackedWeight:
    """Weights [..., N, K] in fp32, bf16 or int8, which has a scale for each row."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        # By NumPy, which asks for huge pages: a core prefetches to the end of a page only.
        width = torch.empty(0, dtype=dtype).element_size()
        self.weights = torch.from_numpy(np.empty((*shape, width), np.uint8)).view(dtype)[..., 0]
        self.scales = torch.ones(shape[:-1])

    def fill(self, weight: Tensor, layer: int) -> None:
        """Keep weight [N, K] as those of a layer."""
        if self.weights.dtype == torch.int8:
            weight = weight.float()
            scales = (torch.linalg.vector_norm(weight, torch.inf, 1) / 127).clamp_(min=1e-12)
            self.scales[layer] = scales
            weight = torch.div(weight, scales[:, None]).round_()
        self.weights[layer] = weight

    def matmul(self, x: Tensor, layer: int) -> Tensor:
        """x [..., K] times a layer's weights: [..., N], for any number of columns."""
        weights, scales = self.weights[layer], self.scales[layer]
        columns = x.flatten(0, -2)
        if weights.dtype == torch.int8 and has_native_int8(x.device):
            out = _int8_product(columns, weights)
        else:
            out = _fp32_product(columns, weights.float())
        return out.mul_(scales).unflatten(0, x.shape[:-1])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The same memory as NumPy has it, bf16 as its bits."""
        bits = self.weights.dtype == torch.bfloat16
        weights = self.weights.view(torch.uint16) if bits else self.weights
        return weights.numpy(), self.scales.numpy()


def _fp32_product(x: Tensor, weights: Tensor) -> Tensor:
    """x [B, K] times weights [N, K], by the library that is faster with few columns."""
    if not torch.backends.mkldnn.is_available():
        return F.linear(x, weights)
    return torch.ops.mkldnn._linear_pointwise(x, weights, None, "none", [], "")


def _int8_product(x: Tensor, weights: Tensor) -> Tensor:
    """The same of int8 weights. Inputs are int8 too, in two parts: what rounding leaves of one is
    magnified and multiplied as another, so that only the precision of the weights is lost."""
    size = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
    steps = x * (_INT8_MAX / size)
    rounded = steps.round()
    rest = (steps - rounded).mul_(2 * _INT8_MAX).round_()
    parts = torch.cat([rounded, rest]).to(torch.int8)
    first, second = torch._int_mm(parts, weights.T).float().chunk(2)
    return torch.add(first, second, alpha=0.5 / _INT8_MAX).mul_(size / _INT8_MAX)


class PackedStack(nn.Module):
    """All blocks of a transformer; their weights, which are no modules any more, layer by layer."""

    def __init__(self, blocks: nn.ModuleList, dtype: torch.dtype) -> None:
        from fish_speech.models.text2semantic.decode import cpu_kernels

        super().__init__()
        self._norms = torch.stack([_norms(block) for block in blocks])  # [L, 2, D]
        self._bias = torch.stack([_bias(block) for block in blocks])  # [L, N] or [L, 0]
        self._eps = blocks[0].attention_norm.eps
        self._packed = [
            PackedWeight((len(blocks), *weight.shape), dtype) for weight in _matrices(blocks[0])
        ]
        self._attention = [block.attention for block in blocks]
        for layer, block in enumerate(blocks):
            for packed, weight in zip(self._packed, _matrices(block), strict=True):
                packed.fill(weight, layer)
            del block.attention.wqkv, block.attention.wo, block.feed_forward
        weights, scales = zip(*(packed.arrays() for packed in self._packed), strict=True)
        self._arrays = (self._norms.numpy(), self._eps, weights, scales, self._bias.numpy())
        self._bytes = sum(array.nbytes for array in weights)
        self._compiled = cpu_kernels.compile_stack(weights[0].dtype)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:  # [B, T, D]
        if cache is not None and len(x) == 1 and x.shape[1] <= _MAX_DECODE_POSITIONS:
            return self._decode(x, rotary, cache)
        wqkv, wo, w13, w2 = self._packed
        for layer, attention in enumerate(self._attention):
            qkv = wqkv.matmul(self._norm(x, layer, 0), layer)
            qkv = qkv + self._bias[layer] if self._bias.numel() else qkv
            x = x + wo.matmul(attention.attend(qkv, rotary, mask, cache), layer)
            gate, up = w13.matmul(self._norm(x, layer, 1), layer).chunk(2, -1)
            x = x + w2.matmul(F.silu(gate) * up, layer)
        return x

    def _norm(self, x: Tensor, layer: int, which: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._norms[layer, which], self._eps)

    def _decode(self, x: Tensor, rotary: Tensor, cache: KeyValueCache) -> Tensor:
        """The same for a few positions behind those in the cache."""
        from fish_speech.models.text2semantic.decode.thread_team import team_for

        attention, (_, columns, _) = self._attention[0], x.shape
        cache.end(columns)  # which must be within it
        heads = (columns, attention.n_head, attention.head_dim)
        queries, width = np.empty(heads, np.float32), self._packed[3].weights.shape[-1]
        context = np.empty((columns, heads[1] * heads[2]), np.float32)
        hidden = np.empty((columns, width), np.float32)
        x = x.clone(memory_format=torch.contiguous_format)
        team_for(self._bytes).run(
            self._compiled, x[0].numpy(), *self._arrays, *rotary.numpy(), cache.keys[:, 0].numpy(),
            cache.values[:, 0].numpy(), cache.length, queries, context, hidden,
        )  # fmt: skip
        return x


class PackedHead(nn.Module):
    """`layers.Head`, whose weights stay in the precision that they have."""

    def __init__(self, norm: RMSNorm, weight: Tensor) -> None:
        from fish_speech.models.text2semantic.decode import cpu_kernels

        super().__init__()
        self.norm = norm
        self._packed = PackedWeight((1, *weight.shape), _packed_dtype(weight.dtype))
        self._packed.fill(weight, 0)
        weights, scales = self._packed.arrays()
        self._arrays = (norm.weight.float().numpy(), norm.eps, weights[0], scales[0])
        self._compiled = cpu_kernels.compile_head(weights.dtype)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., N]
        columns = x.numel() // x.shape[-1]
        if not 0 < columns <= _MAX_DECODE_POSITIONS:
            return self._packed.matmul(self.norm(x), 0)
        from fish_speech.models.text2semantic.decode.thread_team import team_for

        logits = np.empty((columns, len(self._arrays[-1])), np.float32)
        inputs, team = (
            x.detach().reshape(columns, -1).contiguous(),
            team_for(self._arrays[2].nbytes),
        )
        team.run(self._compiled, inputs.numpy(), *self._arrays, logits)
        return torch.from_numpy(logits).view(*x.shape[:-1], -1)


class UpcastEmbedding(nn.Module):
    """An embedding in low precision that gives fp32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach(), False)

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., D]
        return F.embedding(ids, self.weight).float()

    def logits(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return F.linear(x, self.weight)


@torch.no_grad()
def pack(model: DualARTransformer, quantize: str | None = None) -> DualARTransformer:
    """Make a model on a CPU faster, in place: for speaking, no adapters can be added any more.

    Weights stay in the precision that they have (fp16 as fp32), those of the blocks with
    `quantize` "int8" in a byte each; activations are fp32. Returns the model, unchanged where it is
    not on a CPU. Raises `ValueError` where `quantize` is asked for on another device.
    """
    if model.device.type != "cpu":
        if quantize is not None:
            raise ValueError(
                f"int8 is for the CPU, not for {model.device.type}; leave it out there"
            )
        return model
    dtype = torch.int8 if quantize else _packed_dtype(model.dtype)
    for module in (model.norm, model.fast_norm, model.fast_project_in):
        module.float().requires_grad_(False)
    model.layers = nn.ModuleList([PackedStack(model.layers, dtype)])
    model.fast_layers = nn.ModuleList([PackedStack(model.fast_layers, dtype)])
    model.head_type = PackedHead
    norm, weight = model.fast_norm, model.fast_output.weight
    model.fast_norm, model.fast_output = nn.Identity(), PackedHead(norm, weight)
    for name in ("embeddings", "codebook_embeddings", "fast_embeddings"):
        setattr(model, name, UpcastEmbedding(getattr(model, name)))
    trim_malloc()  # the gaps between the layers
    return model


def _packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """What holds all values of another and is read as it is."""
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


def _matrices(block: TransformerBlock) -> list[Tensor]:
    """Weights [N, K] of wqkv, wo, w1 with w3, and w2."""
    attention, feed_forward = block.attention, block.feed_forward
    both = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
    return [attention.wqkv.weight, attention.wo.weight, both, feed_forward.w2.weight]


def _norms(block: TransformerBlock) -> Tensor:
    return torch.stack([block.attention_norm.weight, block.ffn_norm.weight]).float()


def _bias(block: TransformerBlock) -> Tensor:
    bias = block.attention.wqkv.bias
    return torch.empty(0) if bias is None else bias.float()
