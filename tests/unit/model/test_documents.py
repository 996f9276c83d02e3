"""Attention inside documents as a GPU does it, its kernel replaced by a plain one of the same signature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from seedbed.model import documents as module
from seedbed.model.config import SCRATCH_FAMILIES, from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.documents import Documents, dense_mask, document_mask, suits_kernels

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])


def plain_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *, window_size: object
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` promises: (T, H, E) three times to the same."""
    assert window_size == (-1, 0) and torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert sum(lengths) == len(q) == len(k) and max(lengths) <= max_q == max_k
    parts = zip(*(torch.split(x.transpose(0, 1), lengths, dim=1) for x in (q, k, v)), strict=True)  # (H, T, E) each
    seen = [F.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in parts]
    return torch.cat(seen, dim=1).transpose(0, 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_kernel)
    monkeypatch.setattr(module, "suits_kernels", lambda *_: True)


def outcome(arch: str, dropout: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and the gradients of a sum of them."""
    torch.manual_seed(0)
    shape = from_scratch(arch, vocab_size=61, d_model=32, num_layers=2, num_heads=4, max_seq_len=8, dropout=dropout)
    model = Decoder(shape)
    hidden = model(torch.arange(16).view(2, 8), POSITIONS, SEGMENTS)
    (hidden * torch.randn(hidden.shape)).sum().backward()
    return hidden, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.usefixtures("gpu")
def test_the_bounds_of_documents() -> None:
    mask = document_mask(SEGMENTS, torch.bfloat16, 64)
    assert isinstance(mask, Documents)
    assert mask.bounds.tolist() == [0, 3, 7, 8, 16]


@pytest.mark.parametrize("arch", SCRATCH_FAMILIES)
def test_it_is_what_a_mask_gives(arch: str, request: pytest.FixtureRequest) -> None:
    expected, gradients = outcome(arch)
    request.getfixturevalue("gpu")
    found, same = outcome(arch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(same, gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("gpu")
def test_dropout_needs_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seedbed.model.attention.attend_in_documents", pytest.fail)
    hidden, _ = outcome("gpt2", dropout=0.1)
    assert hidden.isfinite().all()


def test_only_some_hardware_has_the_kernels() -> None:
    assert not suits_kernels(torch.device("cpu"), torch.bfloat16, 64)
    assert document_mask(None, torch.bfloat16, 64) is None
    mask = document_mask(SEGMENTS, torch.bfloat16, 64)
    assert isinstance(mask, Tensor) and torch.equal(mask, dense_mask(SEGMENTS))
