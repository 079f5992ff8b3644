"""The operations of `fused.py` in torch's operations, for every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a layer with an adapter: W [out, in], hidden = x down^T [N, r], and up [r, out].
Update = tuple[Tensor, Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, eps=eps).type_as(x) * weight


def rms_norm_backward(
    grad_out: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """The gradient of x, plus that of the residual branch, where there is one."""
    grad, dim = grad_out * weight.float(), x.shape[-1]
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (size * size / dim + eps).rsqrt_()
    value = x * scale
    projection = torch.linalg.vecdot(grad, value)[..., None] / -dim
    grad = grad.addcmul_(value, projection).mul_(scale)
    return (grad if residual_grad is None else grad.add_(residual_grad)).type_as(x)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def silu_mul_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output again, and the gradients of `gate` (written over `grad_out`) and `up`."""
    activated = F.silu(gate)
    out = activated * up
    grad_up = activated.mul_(grad_out)
    grad_gate = grad_out.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return out, grad_gate, grad_up


def lora_linear(x: Tensor, update: Update, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x W^T + hidden up + bias + residual, of x [N, in]: [N, out]."""
    weight, hidden, up = update
    out = hidden @ up
    if bias is not None:
        out += bias
    # Rounded once: in bf16 a small update of what is rounded already would be lost, or of what is
    # as large as `residual`.
    out.addmm_(x, weight.T)
    return out if residual is None else out.add_(residual)


def lora_silu_mul(x: Tensor, first: Update, second: Update) -> tuple[Tensor, Tensor, Tensor]:
    """`silu_mul` of two LoRA layers of x, and what `lora_silu_mul_backward` needs of both."""
    gate, up = lora_linear(x, first, None, None), lora_linear(x, second, None, None)
    return silu_mul(gate, up), gate, up


def lora_silu_mul_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, first: Update, second: Update
) -> tuple[Tensor, Tensor, Tensor]:
    """As `silu_mul_backward`."""
    return silu_mul_backward(grad_out, gate, up)


def rope(qkv: Tensor, rotary: Tensor, heads: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.unflatten(-1, (heads + 2 * local, -1))
    qk, v = parts.tensor_split([heads + local], dim=2)
    return *rotate(qk, rotary).tensor_split([heads], dim=2), v.contiguous()


def rope_backward(parts: tuple[Tensor, ...], rotary: Tensor) -> Tensor:
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


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With torch's own gradient, which keeps the attention weights: they are few."""
    (_, length, _, width), local = q.shape, k.shape[2]
    # Heads that share a key are as good as positions of one head.
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    q = q.unflatten(1, (local, -1)).flatten(2, 3)  # [R, h, H/h * T, d]
    scores = ((q * width**-0.5) @ k.transpose(2, 3)).unflatten(2, (-1, length))
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    out = (weights.flatten(2, 3) @ v).unflatten(2, (-1, length)).flatten(1, 2)  # [R, H, T, d]
    return out.transpose(1, 2).flatten(2)


def cast_lora_factors(
    A: Tensor, B: Tensor, input_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A [r, in] times `input_scale` [in], and B [out, r] transposed, in another dtype. (In that
    layout its gradient is a product of a fast shape.)"""
    return (A * input_scale).to(dtype), B.T.contiguous().to(dtype)


def cast_lora_factors_backward(
    grad_down: Tensor, grad_up: Tensor, input_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, in fp32, from those of `cast_lora_factors`."""
    return grad_down * input_scale, grad_up.to(input_scale.dtype).T


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    lse = logits.logsumexp(1)
    losses = lse - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return losses.where(targets >= 0, 0).sum(), lse


def cross_entropy_backward(logits: Tensor, targets: Tensor, lse: Tensor, grad_out: Tensor) -> None:
    logits.sub_(lse[:, None]).exp_()
    logits.scatter_add_(1, targets.clamp(min=0)[:, None], -torch.ones_like(lse)[:, None])
    logits.mul_((grad_out * (targets >= 0))[:, None])
