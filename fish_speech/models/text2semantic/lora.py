"""LoRA adapters, in loralib's layout and names, always unmerged until `merge_lora` is asked.

loralib merges into the base on every `.eval()`, which in low precision drifts the base at every
validation; here the base is never written. Adapters are fp32 whatever the base is: in bf16 an
Adam-sized step at a small rate leaves most of their entries where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fish_speech.models.text2semantic.layers import Embedding, FeedForward, Linear
from fish_speech.models.text2semantic.ops.lora_autograd import (
    LoRALinearFunction,
    LoRASwiGLUFunction,
)

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

    def is_compatible(self, other: LoRAConfig) -> bool:
        """Whether the adapters of one mean the same in the other; dropout is no matter."""
        return not self.mismatch(other)

    def mismatch(self, other: LoRAConfig) -> str:
        """How they differ, in words; empty where they are compatible."""
        differ = []
        for name in ("r", "alpha"):
            mine, theirs = getattr(self, name), getattr(other, name)
            differ += [f"{name} {mine:g}, not {theirs:g}"] if mine != theirs else []
        only = [name for name in self.targets if name not in other.targets]
        lacks = [name for name in other.targets if name not in self.targets]
        differ += [f"also of {' '.join(only)}"] if only else []
        differ += [f"none of {' '.join(lacks)}"] if lacks else []
        return "; ".join(differ)


def input_scale(layer: LoRALinear) -> Tensor:
    """alpha / r for every input [in] of a layer's adapter, 0 for those that dropout drops.

    One mask for all positions of a batch (variational dropout): scaling A by it costs nothing, a
    mask for every position a tenth of a training step.
    """
    device = layer.lora_A.device
    # Gradient checkpointing draws the mask again; on MPS PyTorch restores only the CPU's state.
    source = "cpu" if device.type == "mps" else device
    scales = torch.full((layer.in_features,), layer.scaling, device=source)
    return F.dropout(scales, layer.dropout, layer.training).to(device)


class LoRALinear(Linear):
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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out], plus a residual."""
        out = LoRALinearFunction.apply(
            x.flatten(0, -2), self.weight, self.bias, self.lora_A, self.lora_B, input_scale(self),
            residual if residual is None else residual.flatten(0, -2),
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])

    def without_lora(self) -> Linear:
        """A layer without adapters, around the same base weight."""
        layer = Linear(self.in_features, self.out_features, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def delta_weight(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the adapters add to those rows of the weight, in fp32."""
        return self.lora_B.float()[rows] @ self.lora_A.float() * self.scaling


class LoRAEmbedding(Embedding):
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

    def without_lora(self) -> Embedding:
        """An embedding without adapters, around the same base weight."""
        layer = Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        layer.weight = self.weight
        return layer.train(self.training)

    def delta_weight(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the adapters add to those rows of the weight, in fp32."""
        return (self.lora_B.float() @ self.lora_A.float()[:, rows]).T * self.scaling

    def logits(self, x: Tensor) -> Tensor:
        """x times the weight as it acts, where it is the output layer too: [..., D] -> [..., V]."""
        inner = F.linear(x.float(), self.lora_B.T * self.scaling)
        return F.linear(x, self.weight) + F.linear(inner, self.lora_A.T).to(x.dtype)


class LoRAFeedForward(FeedForward):
    """A feed-forward of three `LoRALinear`s without biases, which saves half as much for the
    backward as these would one by one."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        if not isinstance(module, FeedForward):
            return False
        layers = (module.w1, module.w3, module.w2)
        return all(isinstance(layer, LoRALinear) and layer.bias is None for layer in layers)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # [..., D]
        parts = [
            part
            for layer in (self.w1, self.w3, self.w2)
            for part in (layer.weight, layer.lora_A, layer.lora_B, input_scale(layer))
        ]
        out = LoRASwiGLUFunction.apply(x.flatten(0, -2), residual.flatten(0, -2), *parts)
        return out.unflatten(0, x.shape[:-1])


def add_lora(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> None:
    """Freeze `model` and give every target module fresh adapters (they change nothing yet)."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        child = name.rpartition(".")[2]
        part = name.partition(".")[0]  # of the model: layers, fast_layers, or a module by itself
        if child not in config.targets and f"{part}.{child}" not in config.targets:
            continue
        kind = LoRALinear if isinstance(module, nn.Linear) else LoRAEmbedding
        _replace(model, name, kind(module, config, generator))
    for name, module in list(model.named_modules()):
        if LoRAFeedForward.fits(module):
            _replace(model, name, LoRAFeedForward(module.w1, module.w3, module.w2))


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
            f"{source}: not the adapters of this base model and LoRA config ({len(wrong)} of them "
            f"differ: '{key}' is {have} in the file, {want} in the model)"
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
        merged = (module.weight.float() + module.delta_weight()).to(module.weight.dtype)
        module.weight = nn.Parameter(merged, requires_grad=False)
        _replace(model, name, module.without_lora())
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRAFeedForward):
            _replace(model, name, FeedForward(module.w1, module.w3, module.w2))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, in its mode (training or not)."""
    model.set_submodule(name, new.train(model.get_submodule(name).training))


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding]]:
    """The adapted modules of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRAEmbedding):
            yield name, module


def effective_weight_rows(module: nn.Linear | nn.Embedding, rows: Tensor) -> Tensor:
    """Rows of a module's weight as it acts, adapters included: [len(rows), in]."""
    weight = module.weight[rows]
    if isinstance(module, LoRALinear | LoRAEmbedding):
        weight = (weight.float() + module.delta_weight(rows)).to(weight.dtype)
    return weight


def _is_adapter(key: str) -> bool:
    return key.endswith((".lora_A", ".lora_B"))
