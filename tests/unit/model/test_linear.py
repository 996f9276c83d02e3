"""Linear layers that make again what is cheap to make: the same numbers, and less that is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from seedbed.model.decoder import gelu, swiglu
from seedbed.model.linear import Linear, activated


def layers(inputs: int, outputs: int, *, bias: bool = True) -> tuple[Linear, nn.Linear]:
    """Ours and torch's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = Linear(inputs, outputs, bias=bias), nn.Linear(inputs, outputs, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(y: Tensor, layer: nn.Linear, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y.float() ** 2).sum(), [*layer.parameters(), *inputs]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "inputs"), [(None, 1), (gelu, 1), (swiglu, 2)])
def test_numbers_are_those_of_torch(dtype: torch.dtype, bias: bool, activation: object, inputs: int) -> None:
    ours, theirs = layers(24, 40, bias=bias)
    x = [torch.randn(2, 5, 24, dtype=dtype, requires_grad=True) for _ in range(inputs)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = ours(*x) if activation is None else activated(ours, activation, *x)  # type: ignore[arg-type]
        wanted = theirs(x[0] if activation is None else activation(*x))  # type: ignore[operator]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    for a, b in zip(gradients(got, ours, *x), gradients(wanted, theirs, *x), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_gradient_for_the_input() -> None:
    ours, theirs = layers(24, 40)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = ours(x), theirs(x)
    for a, b in zip(gradients(got, ours), gradients(wanted, theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_neither_copies_of_weights_nor_what_activations_give_is_kept() -> None:
    ours, theirs = layers(24, 40)
    x = torch.randn(7, 24, dtype=torch.bfloat16, requires_grad=True)

    def kept(layer: nn.Linear) -> set[int]:
        found: set[int] = set()
        known = {x.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in layer.parameters())}

        def keep(tensor: Tensor) -> Tensor:
            found.add(tensor.untyped_storage().data_ptr())
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            y = activated(layer, gelu, x)
        assert y.requires_grad
        return found - known

    assert len(kept(theirs)) == 2
    assert kept(ours) == set()


def test_a_frozen_layer_is_torchs_own() -> None:
    ours, theirs = layers(24, 40)
    ours.requires_grad_(False)
    x = torch.randn(7, 24, requires_grad=True)
    y = ours.after(gelu, x)
    assert torch.equal(y, theirs(F.gelu(x, approximate="tanh")))
    assert "_Product" not in str(y.grad_fn)
