"""Weights packed for a CPU that makes a frame at a time.

There a frame costs reading every weight once, so fewer bytes are faster, and so is an order of them
that both cores can stream. Activations are fp32 whatever the weights are: they cost nothing, and
casting them does.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.models.text2semantic.llama import (
    DualARTransformer,
    KeyValueCache,
    RMSNorm,
    TransformerBlock,
)

_STEPS = 63  # either way, of an input: 127 * 127 * 2 still fits the 16 bits that CPUs sum pairs in

# Looked up once: each look-up takes as long as a small operation.
_multiply_fp32 = torch.ops.mkldnn._linear_pointwise.default
_multiply_fp16 = torch.ops.quantized.linear_dynamic_fp16.default
_multiply_int8 = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


class FloatLinear:
    """A linear layer in fp32 whose weight lies in oneDNN's order."""

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self._bias = _bias(linear)

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return torch.backends.mkldnn.is_available() and HalfLinear.is_native()

    def __call__(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return _multiply_fp32(x, self._packed, self._bias, "none", [], "")


class HalfLinear:
    """A linear layer whose weight is fp16, which holds bf16's values exactly but for tiny ones.

    Multiplies in fp32, a column at a time twice as fast as bf16 is multiplied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, _bias(linear))

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return torch.backends.quantized.engine in ("x86", "fbgemm")

    def __call__(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return _multiply_fp16(x, self._packed)


class Int8Linear:
    """A linear layer whose weight is int8 with one scale for every output channel.

    Inputs are int8 too, in two parts: what rounding leaves of a column is magnified and multiplied
    as another column. The weights are read once for both, so the precision costs no time, and only
    that of the weights is lost.
    """

    def __init__(self, linear: nn.Linear, steps: float | None = None) -> None:
        """`steps`: the inputs come in steps of rounding already, so many to 1 and at most
        `_STEPS`; without it, their largest is looked for."""
        weight, scale = _quantized(linear)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            # torch is pinned; a later one has other names for this.
            warnings.filterwarnings("ignore", message="torch.quantize_per", category=UserWarning)
            weight = torch._make_per_channel_quantized_tensor(
                weight, scale.double() / (steps or _STEPS), zeros, 0
            )
        self._packed = torch.ops.quantized.linear_prepack(weight, None)
        self._bias = _bias(linear)
        self._finds_size = steps is None

    @staticmethod
    def is_native() -> bool:
        """Whether this build of torch has the kernel."""
        return HalfLinear.is_native()

    def __call__(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        steps = x.flatten(0, -2)
        if self._finds_size:
            size = torch.linalg.vector_norm(steps, torch.inf, -1, keepdim=True).clamp_(min=1e-12)
            steps = steps * (_STEPS / size)
        rounded = steps.round()
        rest = (steps - rounded).mul_(2 * _STEPS)
        out = _multiply_int8(torch.cat((rounded, rest)), 1.0, _STEPS + 1, self._packed)
        first, second = out.chunk(2)
        out = torch.add(first, second, alpha=0.5 / _STEPS)
        if self._finds_size:
            out.mul_(size)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if self._bias is None else out + self._bias


class PortableInt8Linear:
    """The same weights for CPUs that have no such kernel, multiplied by bf16 columns."""

    def __init__(self, linear: nn.Linear) -> None:
        weight, scale = _quantized(linear)
        self._weight, self._scale = weight, scale.bfloat16()
        self._bias = _bias(linear)

    def __call__(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        columns = x.bfloat16().flatten(0, -2)
        out = torch._weight_int8pack_mm(columns, self._weight, self._scale)
        out = out.view(*x.shape[:-1], len(self._scale)).to(x.dtype)
        return out if self._bias is None else out + self._bias


class PackedNorm:
    """RMS norm in one pass: by torch's layer norm, which finds no mean to take off x beside -x."""

    def __init__(self, norm: RMSNorm, scale: float = 1.0) -> None:
        self._weight = (norm.weight.detach().float() * scale).repeat(2)
        self._eps = norm.eps

    def __call__(self, x: Tensor) -> Tensor:  # [..., D]
        both = torch.cat((x, -x), -1)
        normed = torch.layer_norm(both, self._weight.shape, self._weight, None, self._eps)
        return normed.narrow(-1, 0, x.shape[-1])


class PackedBlock(nn.Module):
    """A transformer block in as few operations and calls as it takes: with one column they cost
    about as much as the products. What packs the weights is no module, for the same reason."""

    def __init__(self, block: TransformerBlock, kind: type) -> None:
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        w1, w3 = feed_forward.w1, feed_forward.w3
        both = nn.Linear(w1.in_features, 2 * w1.out_features, bias=False, device="meta")
        both.weight = nn.Parameter(torch.cat([w1.weight.detach(), w3.weight.detach()]), False)
        self.attention_norm, self.wqkv = _norm_and(attention.wqkv, block.attention_norm, kind)
        self.ffn_norm, self.w13 = _norm_and(both, block.ffn_norm, kind)
        self.wo, self.w2 = kind(attention.wo), kind(feed_forward.w2)
        del attention.wqkv, attention.wo  # what is left of it would keep them
        self.attend = attention.attend

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:  # [B, T, D]
        x = x + self.wo(self.attend(self.wqkv(self.attention_norm(x)), rotary, mask, cache))
        gate, up = self.w13(self.ffn_norm(x)).chunk(2, -1)
        return x + self.w2(F.silu(gate) * up)


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
        module.float()
    return model


def _norm_and(linear: nn.Linear, norm: RMSNorm, kind: type) -> tuple[PackedNorm, object]:
    """Both packed. What leaves a norm is never larger than this, so int8 need not look for it."""
    if kind is not Int8Linear:
        return PackedNorm(norm), kind(linear)
    largest = math.sqrt(linear.in_features) * norm.weight.abs().max().item()
    steps = _STEPS / max(largest, 1e-12)
    return PackedNorm(norm, steps), Int8Linear(linear, steps)


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().float()


def _quantized(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight [N, K] in int8, and the scale [N] of every output channel."""
    weight = linear.weight.detach().float()
    scale = (torch.linalg.vector_norm(weight, torch.inf, 1) / 127).clamp(min=1e-12)
    return torch.div(weight, scale[:, None]).round_().to(torch.int8), scale
