"""LoRA adapters, in loralib's layout and names, always unmerged until `merge_lora` is asked.

loralib merges into the base on every `.eval()`, which in low precision drifts the base at every
validation; here the base is never written. Adapters are fp32 whatever the base is: in bf16 an
Adam-sized step at a small rate leaves most of their entries where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        mine, theirs = (replace(c, dropout=0, targets=sorted(c.targets)) for c in (self, other))
        return mine == theirs


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


class _Adapted(torch.autograd.Function):
    """x [N, in] -> x W^T + bias + (x * keep) A^T B^T [N, out], where W and the bias are frozen, and
    A [r, in], B [out, r] and keep [in] in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, keep):
        down = (lora_A * keep).to(weight.dtype)
        # In this order in memory the gradient is a product of a quick shape.
        up = lora_B.T.contiguous().to(weight.dtype)
        inner = x @ down.T
        out = inner @ up
        if bias is not None:
            out += bias
        ctx.save_for_backward(x, weight, down, up, inner, keep)
        # Rounded once: in bf16 a small update of what is rounded already would be lost.
        return out.addmm_(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, down, up, inner, keep = ctx.saved_tensors
        inwards = gradient @ up.T
        to_x = (inwards @ down).addmm_(gradient, weight) if ctx.needs_input_grad[0] else None
        return to_x, None, None, (inwards.T @ x) * keep, (inner.T @ gradient).to(keep.dtype).T, None


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

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        out = _Adapted.apply(
            x.flatten(0, -2), self.weight, self.bias, self.lora_A, self.lora_B, kept(self)
        )
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
