"""GELU by its tanh approximation for many bf16 numbers on a CPU, in half of torch's time.

0.5 (1 + tanh(u)) of Hendrycks & Gimpel (2016) is sigmoid(2 u), which loses no digits far below 0, and torch's sigmoid
is several times as fast as its tanh. Pieces that stay in the cache are computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLOPE: Final = 2 * math.sqrt(2 / math.pi)  # 2 u = SLOPE x + CUBE x^3
CUBE: Final = SLOPE * 0.044715
FEWEST: Final = 2**15  # numbers, for which a loop in Python is worth its calls
PIECE: Final = 2**16  # numbers for each thread


def suits_pieces(x: Tensor) -> bool:
    """Whether this is the faster way: measured for bf16 on processors with AVX-512."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() >= FEWEST


def gelu_in_pieces(x: Tensor) -> Tensor:
    """GELU of any shape; for the way back its derivative is kept, in the type of `x`."""
    x = x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    return _gelu(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = torch.empty_like(x)
        ctx.save_for_backward(slope)
        return _gelu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope  # type: ignore[no-any-return]


def _gelu(x: Tensor, slope: Tensor | None = None) -> Tensor:
    """x s, where s = sigmoid(2 u), and into `slope` its derivative s + s (1 - s) t, where t = x times that of 2 u."""
    y, linear, size = torch.empty_like(x), torch.tensor(SLOPE), PIECE * torch.get_num_threads()
    slopes = repeat(None) if slope is None else torch.split(slope.view(-1), size)
    for piece, out, slope_out in zip(
        torch.split(x.view(-1), size), torch.split(y.view(-1), size), slopes, strict=False
    ):
        z = piece.float()
        s = torch.addcmul(linear, z, z, value=CUBE).mul_(z).sigmoid_()
        if slope_out is not None:
            t = torch.addcmul(linear, z, z, value=3 * CUBE).mul_(z)
            slope_out.copy_(t.addcmul_(s, t, value=-1).mul_(s).add_(s))
        out.copy_(s.mul_(z))
    return y
