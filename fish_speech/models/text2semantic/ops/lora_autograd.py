"""LoRA layers as autograd functions: the base is frozen, no copy of the activations is made for the
adapter, and only its two factors get gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fish_speech.models.text2semantic.ops.fused import ops_for


class _Product(NamedTuple):
    """x W^T + x down^T up, of x [N, in], a frozen W [out, in] and the factors `down` [r, in] and
    `up` [r, out] in W's dtype; and what the backward needs: `hidden`, x down^T [N, r], and
    `input_scale` [in], by which `down` was scaled."""

    weight: Tensor
    down: Tensor
    up: Tensor
    hidden: Tensor
    input_scale: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, input_scale: Tensor) -> _Product:
        """Of A [r, in], B [out, r] and `input_scale` in fp32."""
        down, up = ops_for(x).cast_lora_factors(A, B, input_scale, weight.dtype)
        return cls(weight, down, up, x @ down.T, input_scale)

    @property
    def update(self) -> tuple[Tensor, Tensor, Tensor]:
        """An `Update` of `torch_ops`."""
        return self.weight, self.hidden, self.up

    def out(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The product [N, out], plus a bias and a residual."""
        return ops_for(x).lora_linear(x, self.update, bias, residual)

    def grad_hidden(self, grad_out: Tensor) -> Tensor:
        """[N, out] -> [N, r]."""
        return grad_out @ self.up.T

    def grad_input(
        self, grad_out: Tensor, grad_hidden: Tensor, more: Tensor | None = None
    ) -> Tensor:
        """The gradient of x [N, in], added to `more` in place where that is given."""
        grad = grad_hidden @ self.down if more is None else more.addmm_(grad_hidden, self.down)
        return grad.addmm_(grad_out, self.weight)

    def grad_factors(
        self, grad_out: Tensor, grad_hidden: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of A and B, in fp32."""
        return ops_for(x).cast_lora_factors_backward(
            grad_hidden.T @ x, self.hidden.T @ grad_out, self.input_scale
        )


class LoRALinearFunction(torch.autograd.Function):
    """x [N, in], W [out, in], bias, A [r, in], B [out, r], input_scale [in] (these three in fp32),
    residual [N, out] or None -> [N, out]. W and the bias are frozen."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, input_scale, residual):
        product = _Product.of(x, weight, lora_A, lora_B, input_scale)
        ctx.save_for_backward(x, *product)
        return product.out(x, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, *saved = ctx.saved_tensors
        product = _Product(*saved)
        grad_hidden = product.grad_hidden(grad_out)
        grad_x = product.grad_input(grad_out, grad_hidden) if ctx.needs_input_grad[0] else None
        grad_residual = grad_out if ctx.needs_input_grad[6] else None
        factors = product.grad_factors(grad_out, grad_hidden, x)
        return grad_x, None, None, *factors, None, grad_residual


class LoRASwiGLUFunction(torch.autograd.Function):
    """residual + w2(silu(w1(x)) * w3(x)): x and the residual [N, D], then W, A, B and input_scale
    of w1, of w3 and of w2 -> [N, D].

    The input of w2 is not saved: it is as large as either of the two that it is recomputed from.
    """

    @staticmethod
    def forward(ctx, x, residual, *layers):
        w1, w3 = (_Product.of(x, *layer) for layer in (layers[:4], layers[4:8]))
        middle, gate, up = ops_for(x).lora_silu_mul(x, w1.update, w3.update)
        w2 = _Product.of(middle, *layers[8:])
        ctx.save_for_backward(x, gate, up, *w1, *w3, *w2)
        return w2.out(middle, residual=residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, gate, up, *saved = ctx.saved_tensors
        w1, w3, w2 = _Product(*saved[:5]), _Product(*saved[5:10]), _Product(*saved[10:])
        hidden2 = w2.grad_hidden(grad_out)
        grad_middle = w2.grad_input(grad_out, hidden2)
        middle, grad_gate, grad_up = ops_for(x).lora_silu_mul_backward(
            grad_middle, gate, up, w1.update, w3.update
        )
        factors2 = w2.grad_factors(grad_out, hidden2, middle)
        hidden1, hidden3 = w1.grad_hidden(grad_gate), w3.grad_hidden(grad_up)
        factors1 = w1.grad_factors(grad_gate, hidden1, x)
        factors3 = w3.grad_factors(grad_up, hidden3, x)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = w3.grad_input(grad_up, hidden3, w1.grad_input(grad_gate, hidden1))
        grad_residual = grad_out if ctx.needs_input_grad[1] else None
        frozen = (None, *factors1, None), (None, *factors3, None), (None, *factors2, None)
        return grad_x, grad_residual, *sum(frozen, ())
