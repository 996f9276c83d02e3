"""Linear layers that keep little for the way back, where what is cheap to make is made again; embeddings.

I in   O out
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seedbed.device import product_type

Activation = Callable[..., Tensor]


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing on the meta device: for that torch would load code for a second."""

    def reset_parameters(self) -> None:
        """As torch does, where there is memory for it."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """`nn.Linear` that casts its weight to autocast's type on the way back once more, instead of keeping the copy."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return self.after(None, x)

    def after(self, activation: Activation | None, *inputs: Tensor) -> Tensor:
        """The layer on `activation(*inputs)`, (..., I), which is not kept either."""
        dtype = product_type(self.weight)
        casts = dtype != self.weight.dtype
        # The compiler decides by itself what to keep.
        if torch.compiler.is_compiling() or not (self.weight.requires_grad and (casts or activation)):
            return F.linear(inputs[0] if activation is None else activation(*inputs), self.weight, self.bias)
        return _Product.apply(activation, self.weight, self.bias, *(x.to(dtype) for x in inputs))  # type: ignore[no-any-return,no-untyped-call]


def activated(layer: nn.Linear, activation: Activation, *inputs: Tensor) -> Tensor:
    """`layer(activation(*inputs))`, keeping what goes into the activation only, where the layer can."""
    return layer.after(activation, *inputs) if isinstance(layer, Linear) else layer(activation(*inputs))


class _Product(torch.autograd.Function):
    """activation(*inputs) times the weight; products are in the type of the inputs."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation | None, weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.activation, ctx.bias_type = activation, None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *inputs)
        x = inputs[0] if activation is None else activation(*inputs)  # (..., I)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))  # (..., O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(wanted) for x in inputs]
            x = inputs[0] if ctx.activation is None else ctx.activation(*inputs)  # (..., I)
        rows = grad.flatten(0, -2)  # (N, O)
        d_weight = (rows.T @ x.detach().flatten(0, -2)).to(weight.dtype)  # (O, I)
        d_bias = None if ctx.bias_type is None else rows.sum(0).to(ctx.bias_type)
        d_inputs: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if wanted:
            d_x = grad @ weight.to(grad.dtype)  # (..., I)
            d_inputs = (d_x,) if ctx.activation is None else torch.autograd.grad(x, inputs, d_x)
        return None, d_weight, d_bias, *d_inputs
