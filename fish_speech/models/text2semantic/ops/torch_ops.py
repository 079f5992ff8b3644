"""The operations of `fused.py` in torch's operations, for every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Update = tuple[Tensor, Tensor, Tensor]  # W [out, in], x down^T [N, r] and up [r, out] of an adapter


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, eps=eps).type_as(x) * weight


def norm_slope(
    gradient: Tensor, more: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Of x, plus what else there is of it."""
    slope, dim = gradient * weight.float(), x.shape[-1]
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (size * size / dim + eps).rsqrt_()
    value = x * scale
    along = torch.linalg.vecdot(slope, value)[..., None] / -dim
    slope = slope.addcmul_(value, along).mul_(scale)
    return (slope if more is None else slope.add_(more)).type_as(x)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gate_slope(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `gate` made, and the gradients of both; the first takes the place of the output's."""
    opens = F.silu(gate)
    out = opens * up
    to_up = opens.mul_(gradient)
    to_gate = gradient.mul_(up)
    torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
    return out, to_gate, to_up


def adapted(x: Tensor, update: Update, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    """x [N, in] times W^T and the update [N, out], plus a bias and what it is added to."""
    weight, inner, up = update
    out = inner @ up
    if bias is not None:
        out += bias
    # Rounded once: in bf16 a small update of what is rounded already would be lost, or of what is
    # as large as `onto`.
    out.addmm_(x, weight.T)
    return out if onto is None else out.add_(onto)


def adapted_gate(x: Tensor, first: Update, second: Update) -> tuple[Tensor, Tensor, Tensor]:
    """`gate` of two adapted products of x, and the two as `adapted_gate_slope` takes them."""
    opens, up = adapted(x, first, None, None), adapted(x, second, None, None)
    return gate(opens, up), opens, up


def adapted_gate_slope(
    gradient: Tensor, opens: Tensor, up: Tensor, first: Update, second: Update
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gate_slope`."""
    return gate_slope(gradient, opens, up)


def turn(qkv: Tensor, rotary: Tensor, heads: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.unflatten(-1, (heads + 2 * local, -1))
    qk, v = parts.tensor_split([heads + local], dim=2)
    return *rotate(qk, rotary).tensor_split([heads], dim=2), v.contiguous()


def turn_back(parts: tuple[Tensor, ...], rotary: Tensor) -> Tensor:
    cos, sin = rotary
    q, k, v = parts
    qk = rotate(torch.cat([q, k], dim=2), (cos, -sin))
    return torch.cat([qk, v], dim=2).flatten(2)


def rotate(x: Tensor, rotary: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent pairs of x [B, T, heads, head_dim] by rotary [2, T, head_dim]."""
    cos, sin = (part[:, None] for part in rotary)
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With torch's own gradient, which keeps the weights: they are few."""
    (_, length, _, width), local = q.shape, k.shape[2]
    # Heads that share a key are as good as columns of one head.
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    q = q.unflatten(1, (local, -1)).flatten(2, 3)  # [R, h, H/h * T, d]
    scores = ((q * width**-0.5) @ k.transpose(2, 3)).unflatten(2, (-1, length))
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    out = (weights.flatten(2, 3) @ v).unflatten(2, (-1, length)).flatten(1, 2)  # [R, H, T, d]
    return out.transpose(1, 2).flatten(2)


def halves(A: Tensor, B: Tensor, keep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An adapter's A [r, in] times `keep` [in], and B [out, r] turned: in this order in memory its
    gradient is a product of a quick shape."""
    return (A * keep).to(dtype), B.T.contiguous().to(dtype)


def halves_back(to_down: Tensor, to_up: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, in fp32, from those of `halves`."""
    return to_down * keep, to_up.to(keep.dtype).T


def entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    sizes = logits.logsumexp(1)
    losses = sizes - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return losses.where(targets >= 0, 0).sum(), sizes


def entropy_slope(logits: Tensor, targets: Tensor, sizes: Tensor, gradient: Tensor) -> None:
    logits.sub_(sizes[:, None]).exp_()
    logits.scatter_add_(1, targets.clamp(min=0)[:, None], -torch.ones_like(sizes)[:, None])
    logits.mul_((gradient * (targets >= 0))[:, None])
