"""LoRA adapters, in loralib's layout and names, always unmerged until `merge_lora` is asked.

loralib merges into the base on every `.eval()`, which in low precision drifts the base at every
validation; here the base is never written. Adapters are fp32 whatever the base is: in bf16 an
Adam-sized step at a small rate leaves most of their entries where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fish_speech.models.text2semantic.ops.fused import gated, passes_for

LINEAR_TARGETS = ("wqkv", "wo", "w1", "w2", "w3", "output", "fast_output")
EMBEDDING_TARGETS = ("embeddings", "codebook_embeddings", "fast_embeddings")


@dataclass(frozen=True)
class LoRAConfig:
    """Rank `r`, scale `alpha / r`, dropout before the adapters, and the modules that get them:
    `wqkv` those of both transformers, `fast_layers.wqkv` those of the fast one alone."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.01
    targets: Sequence[str] = LINEAR_TARGETS + EMBEDDING_TARGETS

    def __post_init__(self) -> None:
        known = {*LINEAR_TARGETS, *EMBEDDING_TARGETS}
        unknown = {name.removeprefix("fast_layers.") for name in self.targets} - known
        if self.r < 1 or unknown or not self.targets:
            raise ValueError(
                f"LoRA config: r must be at least 1 (is {self.r}) and targets among "
                f"{' '.join(LINEAR_TARGETS + EMBEDDING_TARGETS)} (are {list(self.targets)})"
            )

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def fits(self, other: LoRAConfig) -> bool:
        """Whether the adapters of one mean the same in the other; dropout is no matter."""
        return not self.beside(other)

    def beside(self, other: LoRAConfig) -> str:
        """In what they don't fit, in words; empty where they do."""
        differ = []
        for name in ("r", "alpha"):
            mine, theirs = getattr(self, name), getattr(other, name)
            differ += [f"{name} {mine:g}, not {theirs:g}"] if mine != theirs else []
        only = [name for name in self.targets if name not in other.targets]
        lacks = [name for name in other.targets if name not in self.targets]
        differ += [f"also of {' '.join(only)}"] if only else []
        differ += [f"none of {' '.join(lacks)}"] if lacks else []
        return "; ".join(differ)


def kept(layer: LoRALinear) -> Tensor:
    """The scale of every input [in] of a layer's adapters, 0 for those that dropout takes.

    The same ones for all columns of a batch (variational dropout): applied to the adapter that
    costs nothing, to every column a tenth of a training step.
    """
    device = layer.lora_A.device
    # What is computed again for a gradient draws again; PyTorch restores no other state on MPS.
    source = "cpu" if device.type == "mps" else device
    scales = torch.full((layer.in_features,), layer.scaling, device=source)
    return F.dropout(scales, layer.dropout, layer.training).to(device)


class _Product(NamedTuple):
    """x W^T + x down^T up of columns x [N, in], a frozen W [out, in] and an adapter's halves
    [r, in] and [r, out], with what its gradients take: `inner`, x down^T [N, r], and the scales
    `keep` [in] of the inputs that `down` holds."""

    weight: Tensor
    down: Tensor
    up: Tensor
    inner: Tensor
    keep: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, keep: Tensor) -> _Product:
        """Of A [r, in], B [out, r] and `keep` in fp32."""
        down, up = passes_for(x).halves(A, B, keep, weight.dtype)
        return cls(weight, down, up, x @ down.T, keep)

    @property
    def update(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `passes_for` calls one: W, and of what a product of it is to be added."""
        return self.weight, self.inner, self.up

    def out(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """The product [N, out] (plus a bias, and what it is added to)."""
        return passes_for(x).adapted(x, self.update, bias, onto)

    def inwards(self, gradient: Tensor) -> Tensor:
        """Of the product's gradient [N, out], that between the adapter's halves [N, r]."""
        return gradient @ self.up.T

    def slope_of_x(self, gradient: Tensor, inwards: Tensor, more: Tensor | None = None) -> Tensor:
        """x's gradient [N, in], added to `more` in its place."""
        slope = inwards @ self.down if more is None else more.addmm_(inwards, self.down)
        return slope.addmm_(gradient, self.weight)

    def slopes(self, gradient: Tensor, inwards: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of A and B, in fp32."""
        return passes_for(x).halves_back(inwards.T @ x, self.inner.T @ gradient, self.keep)


class _Adapted(torch.autograd.Function):
    """A `_Product` of x [N, in]; W and the bias are frozen, A, B and `keep` in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, keep, onto):
        product = _Product.of(x, weight, lora_A, lora_B, keep)
        ctx.save_for_backward(x, *product)
        return product.out(x, bias, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, *saved = ctx.saved_tensors
        product = _Product(*saved)
        inwards = product.inwards(gradient)
        to_x = product.slope_of_x(gradient, inwards) if ctx.needs_input_grad[0] else None
        to_onto = gradient if ctx.needs_input_grad[6] else None
        return to_x, None, None, *product.slopes(gradient, inwards, x), None, to_onto


class _AdaptedGate(torch.autograd.Function):
    """SwiGLU of x [N, D] through `_Product`s, added to `onto`: W, A, B and `keep` of w1, then of w3
    and w2.

    What w2 takes is not kept: it is as large as each of the two that a pass makes it of.
    """

    @staticmethod
    def forward(ctx, x, onto, *layers):
        w1, w3 = (_Product.of(x, *layer) for layer in (layers[:4], layers[4:8]))
        middle, gate, up = passes_for(x).adapted_gate(x, w1.update, w3.update)
        w2 = _Product.of(middle, *layers[8:])
        ctx.save_for_backward(x, gate, up, *w1, *w3, *w2)
        return w2.out(middle, onto=onto)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, gate, up, *saved = ctx.saved_tensors
        w1, w3, w2 = _Product(*saved[:5]), _Product(*saved[5:10]), _Product(*saved[10:])
        inwards = w2.inwards(gradient)
        to_middle = w2.slope_of_x(gradient, inwards)
        middle, to_gate, to_up = passes_for(x).adapted_gate_slope(
            to_middle, gate, up, w1.update, w3.update
        )
        slopes2 = w2.slopes(gradient, inwards, middle)
        inwards1, inwards3 = w1.inwards(to_gate), w3.inwards(to_up)
        slopes1, slopes3 = w1.slopes(to_gate, inwards1, x), w3.slopes(to_up, inwards3, x)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = w3.slope_of_x(to_up, inwards3, w1.slope_of_x(to_gate, inwards1))
        slopes = *(None, *slopes1, None), *(None, *slopes3, None), *(None, *slopes2, None)
        return to_x, gradient if ctx.needs_input_grad[1] else None, *slopes


class LoRALinear(nn.Linear):
    """A frozen linear layer plus `lora_B @ lora_A * alpha / r`."""

    def __init__(self, base: nn.Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.dropout = config.scaling, config.dropout
        bound = 1 / math.sqrt(base.in_features)  # kaiming uniform with a = sqrt(5)
        lora_A = torch.empty(config.r, base.in_features).uniform_(
            -bound, bound, generator=generator
        )
        self.lora_A = nn.Parameter(lora_A.to(base.weight.device))
        self.lora_B = nn.Parameter(
            torch.zeros(base.out_features, config.r, device=base.weight.device)
        )

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out], added to `onto` where there is such."""
        out = _Adapted.apply(
            x.flatten(0, -2), self.weight, self.bias, self.lora_A, self.lora_B, kept(self),
            onto if onto is None else onto.flatten(0, -2),
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])

    def plain(self) -> nn.Linear:
        """A layer without adapters, around the same base weight."""
        layer = nn.Linear(self.in_features, self.out_features, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def update(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the adapters add to those rows of the weight, in fp32."""
        return self.lora_B.float()[rows] @ self.lora_A.float() * self.scaling


class LoRAEmbedding(nn.Embedding):
    """A frozen embedding plus `(lora_B @ lora_A).T * alpha / r`."""

    def __init__(self, base: nn.Embedding, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.scaling = config.scaling
        lora_B = torch.randn(base.embedding_dim, config.r, generator=generator)
        self.lora_A = nn.Parameter(
            torch.zeros(config.r, base.num_embeddings, device=base.weight.device)
        )
        self.lora_B = nn.Parameter(lora_B.to(base.weight.device))

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., D]
        base = F.embedding(ids, self.weight)
        update = F.linear(F.embedding(ids, self.lora_A.T), self.lora_B * self.scaling)
        return base + update.to(base.dtype)

    def plain(self) -> nn.Embedding:
        """An embedding without adapters, around the same base weight."""
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        layer.weight = self.weight
        return layer.train(self.training)

    def update(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the adapters add to those rows of the weight, in fp32."""
        return (self.lora_B.float() @ self.lora_A.float()[:, rows]).T * self.scaling

    def logits(self, x: Tensor) -> Tensor:
        """x times the weight as it acts, where it is the output layer too: [..., D] -> [..., V]."""
        inner = F.linear(x.float(), self.lora_B.T * self.scaling)
        return F.linear(x, self.weight) + F.linear(inner, self.lora_A.T).to(x.dtype)


def added(layer: nn.Module, x: Tensor, onto: Tensor) -> Tensor:
    """A linear layer of x, added to another tensor: in one pass where it has adapters."""
    return layer(x, onto) if isinstance(layer, LoRALinear) else onto + layer(x)


def swiglu(x: Tensor, w1: nn.Module, w3: nn.Module, w2: nn.Module, onto: Tensor) -> Tensor:
    """w2(silu(w1(x)) * w3(x)) added to another tensor: [..., D] -> [..., D]. Where all three are
    adapted, half as much is kept for the gradient."""
    layers = (w1, w3, w2)
    if not all(isinstance(layer, LoRALinear) and layer.bias is None for layer in layers):
        return added(w2, gated(w1(x), w3(x)), onto)
    parts = [
        part for layer in layers for part in (layer.weight, layer.lora_A, layer.lora_B, kept(layer))
    ]
    out = _AdaptedGate.apply(x.flatten(0, -2), onto.flatten(0, -2), *parts)
    return out.unflatten(0, x.shape[:-1])


def add_lora(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> None:
    """Freeze `model` and give every target module fresh adapters (they change nothing yet)."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent_name, _, child = name.rpartition(".")
        part = name.partition(".")[0]  # of the model: layers, fast_layers, or a module by itself
        if child not in config.targets and f"{part}.{child}" not in config.targets:
            continue
        kind = LoRALinear if isinstance(module, nn.Linear) else LoRAEmbedding
        adapted = kind(module, config, generator).train(module.training)
        setattr(model.get_submodule(parent_name), child, adapted)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of a model: `<module>.lora_A` and `<module>.lora_B`."""
    return {key: value for key, value in model.state_dict().items() if _is_adapter(key)}


def load_lora(model: nn.Module, adapters: dict[str, Tensor], source: object) -> None:
    """Copy adapters (as a checkpoint names them) into a model that has the same ones.

    Raises `ValueError` that names `source` where adapters are missing, unknown or misshapen, so
    that what is not loaded is exactly the frozen base.
    """
    adapters = {key.removeprefix("model."): value for key, value in adapters.items()}
    wanted = lora_state_dict(model)
    wrong = {
        key
        for key in wanted.keys() | adapters.keys()
        if key not in wanted or key not in adapters or wanted[key].shape != adapters[key].shape
    }
    if wrong:
        key = min(wrong)
        have, want = (tuple(d[key].shape) if key in d else "none" for d in (adapters, wanted))
        raise ValueError(
            f"{source}: {len(wrong)} adapters do not fit the base model and LoRA config "
            f"('{key}' is {have} in the file, {want} in the model)"
        )
    missing = model.load_state_dict(adapters, strict=False).missing_keys
    assert not any(_is_adapter(key) for key in missing)


def adapted_targets(adapters: dict[str, Tensor]) -> tuple[str, ...]:
    """The modules that the adapters in a file belong to, whatever its prefix."""
    names = {key.split(".")[-2] for key in adapters if _is_adapter(key) and "." in key[:-7]}
    return tuple(name for name in LINEAR_TARGETS + EMBEDDING_TARGETS if name in names)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the base weights, in fp32, and make the modules plain again."""
    for name, module in list(lora_modules(model)):
        merged = (module.weight.float() + module.update()).to(module.weight.dtype)
        module.weight = nn.Parameter(merged, requires_grad=False)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, module.plain())


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding]]:
    """The adapted modules of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRAEmbedding):
            yield name, module


def weight_rows(module: nn.Linear | nn.Embedding, rows: Tensor) -> Tensor:
    """Rows of a module's weight as it acts, adapters included: [len(rows), in]."""
    weight = module.weight[rows]
    if isinstance(module, LoRALinear | LoRAEmbedding):
        weight = (weight.float() + module.update(rows)).to(weight.dtype)
    return weight


def _is_adapter(key: str) -> bool:
    return key.endswith((".lora_A", ".lora_B"))
