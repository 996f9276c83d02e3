from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from seedbed.model import decoder
from seedbed.model.config import from_scratch
from seedbed.model.cpu_gelu import FEWEST, gelu_in_pieces, suits_pieces
from seedbed.model.decoder import Decoder


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """As torch's own in float64, and its derivative; 1 + tanh(u) would lose digits where u is far below 0."""
    precise = x.detach().double().requires_grad_()
    y = precise / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (precise + 0.044715 * precise**3)))
    assert torch.allclose(y, gelu(precise, approximate="tanh"), rtol=0, atol=1e-14)
    [slope] = torch.autograd.grad(y.sum(), precise)
    return y.detach(), slope


def share_off(found: Tensor, right: Tensor) -> float:
    """Of the numbers that are not the nearest one in bf16."""
    return float((found != right.bfloat16()).float().mean())


@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_are_rounded_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, the last of them short; nearer than torch's, and the same with a gradient as without."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 5, 2**14 + 7)).bfloat16().requires_grad_()
    y, slope = exact(x)
    ours, theirs = gelu_in_pieces(x), gelu(x, approximate="tanh")
    assert torch.equal(ours, gelu_in_pieces(x.detach()))
    assert share_off(ours, y) < 1e-3 < share_off(theirs, y)
    [gradient] = torch.autograd.grad(ours.float().sum(), x)
    assert share_off(gradient, slope) < 2e-3


def test_order_in_memory_does_not_matter() -> None:
    x = torch.randn(64, 2048).bfloat16().T.requires_grad_()
    assert share_off(gelu_in_pieces(x), exact(x)[0]) < 1e-3


@pytest.mark.parametrize("number", [0.0, -0.0, 1e4, -1e4, 3e38, -3e38, float("inf"), float("-inf"), float("nan")])
def test_extremes_are_as_torch_has_them(number: float) -> None:
    x = torch.full((8,), number).bfloat16().requires_grad_()
    ours, theirs = gelu_in_pieces(x), gelu(x, approximate="tanh")
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_a_model_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """And learns in the same direction as in float32, with torch's."""
    assert suits_pieces(torch.empty(FEWEST, dtype=torch.bfloat16))
    assert not suits_pieces(torch.empty(FEWEST - 1, dtype=torch.bfloat16))
    assert not suits_pieces(torch.empty(FEWEST))
    taken: list[tuple[int, ...]] = []

    def counted(x: Tensor) -> Tensor:
        taken.append(tuple(x.shape))
        return gelu_in_pieces(x)

    monkeypatch.setattr(decoder, "gelu_in_pieces", counted)
    torch.manual_seed(0)
    model = Decoder(from_scratch("gpt2", vocab_size=50, d_model=64, num_layers=2, num_heads=2, max_seq_len=64))
    ids, places = torch.randint(50, (4, 64)), torch.arange(64).expand(4, 64)

    def gradients(dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(ids, places, None).float().square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    plain = gradients(torch.float32)
    assert taken == []
    assert torch.cosine_similarity(gradients(torch.bfloat16), plain, dim=0) > 0.999
    assert taken == [(4, 64, 256)] * 4  # of each layer, and once more on the way back
