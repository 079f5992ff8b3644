"""Weights packed for a CPU that makes a frame at a time.

There a frame costs reading every weight once, so fewer bytes are faster, and so is an order of them
that both cores can stream. Activations are fp32 whatever the weights are: they cost nothing, and
casting them does. What is between the products of one or a few columns is compiled (`column.py`,
imported only where it is needed: importing compiles).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.models.text2semantic.llama import (
    DualARTransformer,
    KeyValueCache,
    RMSNorm,
    TransformerBlock,
)

_SHORT = 256  # columns; attention to more is faster on all cores
_FEW = 4  # columns

# Looked up once: each look-up takes as long as a small operation.
_multiply_fp32 = torch.ops.mkldnn._linear_pointwise.default
_multiply_fp16 = torch.ops.quantized.linear_dynamic_fp16.default
_multiply_int8 = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


class PackedLinear:
    """A linear layer whose weight is packed: fp32 [..., K] -> [..., N]."""

    parts = 1  # of a single column that `product` takes, see `column.py`
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        """x [B, K] times the weight: [B, N], without the bias."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        out = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


class FloatLinear(PackedLinear):
    """One whose weight is fp32, in oneDNN's order."""

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = _bias(linear)

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return torch.backends.mkldnn.is_available() and HalfLinear.is_native()

    def product(self, x: Tensor) -> Tensor:
        return _multiply_fp32(x, self._packed, None, "none", [], "")


class HalfLinear(PackedLinear):
    """One whose weight is fp16, which holds bf16's values exactly but for tiny ones.

    Multiplies in fp32, a column at a time twice as fast as bf16 is multiplied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), None)
        self.bias = _bias(linear)

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return torch.backends.quantized.engine in ("x86", "fbgemm")

    def product(self, x: Tensor) -> Tensor:
        return _multiply_fp16(x, self._packed)


class Int8Linear(PackedLinear):
    """One whose weight is int8 with one scale for every output channel.

    Inputs are int8 too, in two parts: what rounding leaves of a column is magnified and multiplied
    as another column. The weights are read once for both, so the precision costs no time, and only
    that of the weights is lost.
    """

    parts = 2

    def __init__(self, linear: nn.Linear) -> None:
        from fish_speech.models.text2semantic import column

        self._steps, self._magnified = column.STEPS, column.MAGNIFIED
        weight, scale = _quantized(linear)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            # torch is pinned; a later one has other names for this.
            warnings.filterwarnings("ignore", message="torch.quantize_per", category=UserWarning)
            weight = torch._make_per_channel_quantized_tensor(
                weight, scale.double() / self._steps, zeros, 0
            )
        self._packed = torch.ops.quantized.linear_prepack(weight, None)
        self.bias = _bias(linear)

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return HalfLinear.is_native()

    def product(self, x: Tensor) -> Tensor:
        """The parts of columns, in steps of rounding, times the weight."""
        return _multiply_int8(x, 1.0, self._steps + 1, self._packed)

    def __call__(self, x: Tensor) -> Tensor:
        size = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        steps = x * (self._steps / size)
        rounded = steps.round()
        rest = (steps - rounded).mul_(self._magnified)
        first, second = self.product(torch.stack((rounded, rest)))
        out = torch.add(first, second, alpha=1 / self._magnified).mul_(size)
        return out if self.bias is None else out + self.bias


class PortableInt8Linear(PackedLinear):
    """The same weights for CPUs that have no such kernel, multiplied by bf16 columns."""

    def __init__(self, linear: nn.Linear) -> None:
        weight, scale = _quantized(linear)
        self._weight, self._scale = weight, scale.bfloat16()
        self.bias = _bias(linear)

    def product(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.bfloat16(), self._weight, self._scale).float()


class PackedNorm:
    """RMS norm in one pass: by torch's layer norm, which finds no mean to take off x beside -x."""

    def __init__(self, norm: RMSNorm) -> None:
        weight = norm.weight.detach().float()
        self.weight, self.eps = weight.numpy(), norm.eps
        self._twice = weight.repeat(2)

    def __call__(self, x: Tensor) -> Tensor:  # [..., D]
        both = torch.cat((x, -x), -1)
        normed = torch.layer_norm(both, self._twice.shape, self._twice, None, self.eps)
        return normed.narrow(-1, 0, x.shape[-1])


class PackedBlock(nn.Module):
    """A transformer block in as few operations and calls as it takes. What packs the weights is no
    module, for the same reason."""

    def __init__(self, block: TransformerBlock, kind: type[PackedLinear]) -> None:
        super().__init__()
        self.attention, feed_forward = block.attention, block.feed_forward
        w1, w3 = feed_forward.w1, feed_forward.w3
        both = nn.Linear(w1.in_features, 2 * w1.out_features, bias=False, device="meta")
        both.weight = nn.Parameter(torch.cat([w1.weight.detach(), w3.weight.detach()]), False)
        self.attention_norm, self.ffn_norm = map(PackedNorm, (block.attention_norm, block.ffn_norm))
        self.wqkv, self.wo = kind(self.attention.wqkv), kind(self.attention.wo)
        self.w13, self.w2 = kind(both), kind(feed_forward.w2)
        del self.attention.wqkv, self.attention.wo
        self._parts, self._width = kind.parts, w1.out_features
        bias = self.wqkv.bias
        self._bias = np.empty(0, np.float32) if bias is None else bias.numpy()

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:  # [B, T, D]
        if cache is not None and _is_few(x, cache):
            return self._few(x, rotary, cache)
        attended = self.attention.attend(self.wqkv(self.attention_norm(x)), rotary, mask, cache)
        x = x + self.wo(attended)
        gate, up = self.w13(self.ffn_norm(x)).chunk(2, -1)
        return x + self.w2(F.silu(gate) * up)

    def _few(self, x: Tensor, rotary: Tensor, cache: KeyValueCache) -> Tensor:
        """The same for one or a few columns behind those in the cache."""
        from fish_speech.models.text2semantic import column

        attention, (_, columns, dim) = self.attention, x.shape
        sizes = np.empty(columns, np.float32)

        def rows(width: int) -> np.ndarray:
            return np.empty((columns, self._parts, width), np.float32)

        def product(linear: PackedLinear, taken: np.ndarray) -> np.ndarray:
            out = linear.product(torch.from_numpy(taken.reshape(-1, taken.shape[-1])))
            return out.numpy().reshape(columns, self._parts, -1)

        before, taken = x[0].contiguous().numpy(), rows(dim)
        column.norm(before, self.attention_norm.weight, self.attention_norm.eps, taken, sizes)
        out = product(self.wqkv, taken)
        queries = np.empty((columns, attention.n_head, attention.head_dim), np.float32)
        keys, values = cache.room(attention.layer, columns)
        filled = (keys[0].numpy(), values[0].numpy(), cache.length)
        column.rotate(out, sizes, self._bias, *rotary.numpy(), queries, *filled)
        taken = rows(attention.n_head * attention.head_dim)
        if cache.length + columns <= _SHORT:
            column.attend(queries, *filled, taken, sizes)
        else:
            end = cache.length + 1
            heads = torch.from_numpy(queries).view(*keys.shape[:2], -1, attention.head_dim)
            out = F.scaled_dot_product_attention(heads, keys[:, :, :end], values[:, :, :end])
            column.take(out.numpy().reshape(1, -1), taken, sizes)
        out = product(self.wo, taken)
        between, taken = np.empty((columns, dim), np.float32), rows(dim)
        column.add(before, out, sizes, between)
        column.norm(between, self.ffn_norm.weight, self.ffn_norm.eps, taken, sizes)
        out = product(self.w13, taken)
        taken = rows(self._width)
        column.gate(out, sizes, taken)
        out = product(self.w2, taken)
        after = torch.empty_like(x)
        column.add(between, out, sizes, after[0].numpy())
        return after


def _is_few(x: Tensor, cache: KeyValueCache) -> bool:
    """Whether calls cost more than what is computed for x [B, T, D]."""
    batch, columns, _ = x.shape
    short = cache.length + columns <= _SHORT
    return batch == 1 and (columns == 1 or (columns <= _FEW and short))


class WideEmbedding(nn.Module):
    """An embedding that stays in few bytes and gives fp32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach(), False)

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., D]
        return F.embedding(ids, self.weight).float()


def pack(model: DualARTransformer, quantize: str | None = None) -> DualARTransformer:
    """Make a model on a CPU faster, in place: for speaking, no adapters can be added any more.

    Weights stay in the precision that they have (bf16 as fp16), those of the blocks with `quantize`
    "int8" in a byte each; activations are fp32. Returns the model, unchanged where this build of
    torch has no kernel for it or it is not on a CPU. Raises `ValueError` where `quantize` is asked
    for on another device.
    """
    if quantize is not None and model.device.type != "cpu":
        raise ValueError(f"int8 is for the CPU, not for {model.device.type}; leave it out there")
    plain = FloatLinear if model.dtype == torch.float32 else HalfLinear
    if model.device.type != "cpu" or not (quantize or plain.is_native()):
        return model
    from fish_speech.models.text2semantic import column  # noqa: F401 (compiled now, not later)

    kind = plain
    if quantize is not None:
        kind = Int8Linear if Int8Linear.is_native() else PortableInt8Linear
    for blocks in (model.layers, model.fast_layers):
        for index, block in enumerate(blocks):
            blocks[index] = PackedBlock(block, kind)
    output = model.fast_output
    del model.fast_output  # the name of a module takes nothing else
    model.fast_output = plain(output) if plain.is_native() else output.float()
    for name in ("embeddings", "codebook_embeddings", "fast_embeddings"):
        setattr(model, name, WideEmbedding(getattr(model, name)))
    for module in (model.norm, model.fast_norm, model.fast_project_in):
        module.float().requires_grad_(False)
    return model


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().float()


def _quantized(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight [N, K] in int8, and the scale [N] of every output channel."""
    weight = linear.weight.detach().float()
    scale = (torch.linalg.vector_norm(weight, torch.inf, 1) / 127).clamp(min=1e-12)
    return torch.div(weight, scale[:, None]).round_().to(torch.int8), scale
