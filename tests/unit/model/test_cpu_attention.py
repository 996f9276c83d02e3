from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from seedbed.model import cpu_attention as module
from seedbed.model.attention import Attention
from seedbed.model.config import from_scratch
from seedbed.model.cpu_attention import block_attention
from seedbed.model.documents import dense_mask


def inputs(rows: int, heads: int, kv_heads: int, tokens: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and a gradient as a model's layers make them: (B, T, H, E) in memory."""
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, tokens, h, size, generator=g) for h in (heads, kv_heads, kv_heads, heads)]
    return [x.to(dtype).transpose(1, 2) for x in made]


def documents(rows: int, tokens: int) -> Tensor:
    """Rows of several documents, cut in other places in each."""
    cuts = torch.arange(rows)[:, None] + torch.tensor([tokens // 3, tokens // 2])
    mask = dense_mask(torch.searchsorted(cuts, torch.arange(tokens).repeat(rows, 1), right=True))
    assert mask is not None
    return mask


def torchs_own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    y: Tensor = block_attention(q, k, v, mask)
    return y


@pytest.fixture(
    params=[(256, 64, 3 << 20), (4, 2, 1), (7, 3, 1 << 20)], ids=["shipped", "small blocks", "ragged blocks"]
)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", request.param[0])
    monkeypatch.setattr(module, "MASKED_BLOCK", request.param[0])
    monkeypatch.setattr(module, "SEEN_STEP", request.param[1])
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param[2])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", [(3, 4, 4, 20, 8), (2, 6, 2, 33, 16), (1, 3, 1, 1, 8), (5, 2, 2, 8, 12)])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_it_is_softmax_attention(shape: tuple[int, int, int, int, int], masked: bool) -> None:
    *qkv, grad = inputs(*shape, torch.float64)
    mask = documents(shape[0], shape[3]) if masked else None
    for x in qkv:
        x.requires_grad_()
    q, k, v = qkv
    ours, theirs = attended(q, k, v, mask), torchs_own(q, k, v, mask)
    torch.testing.assert_close(ours, theirs)
    got, expected = (torch.autograd.grad(y, qkv, grad) for y in (ours, theirs))
    # Gradients of keys and values are summed in float32.
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("tokens", [64, 300, 600])
def test_in_bfloat16_it_is_as_near_as_torchs_own(tokens: int) -> None:
    *qkv, grad = inputs(2, 6, 2, tokens, 64, torch.bfloat16)
    exact = [x.double().requires_grad_() for x in qkv]
    truth = torchs_own(*exact)
    right = [truth, *torch.autograd.grad(truth, exact, grad.double())]

    def error(attention: Callable[..., Tensor]) -> list[float]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        y = attention(*leaves)
        found = [y, *torch.autograd.grad(y, leaves, grad)]
        return [float((f - r).detach().norm() / r.detach().norm()) for f, r in zip(found, right, strict=True)]

    for ours, theirs in zip(error(attended), error(torchs_own), strict=True):
        assert ours < 2 * theirs + 1e-4


def test_products_have_few_shapes_wherever_documents_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps code for each shape that it meets: a gigabyte of it, before."""
    shapes, product = set(), torch.baddbmm

    def seen(bias: Tensor, *operands: Tensor, alpha: float) -> Tensor:
        shapes.add(bias.shape)
        return product(bias, *operands, alpha=alpha)

    monkeypatch.setattr(torch, "baddbmm", seen)
    q, k, v, _ = inputs(1, 2, 1, 512, 8, torch.bfloat16)
    for cut in range(1, 512, 31):
        mask = dense_mask((torch.arange(512) >= cut).int()[None])
        assert mask is not None
        attended(q, k, v, mask)
    assert len(shapes) <= 512 // 64


def test_torch_knows_what_it_needs_to_compile_it() -> None:
    *qkv, _ = inputs(2, 4, 2, 12, 8, torch.float32)
    for x in qkv:
        x.requires_grad_()
    torch.library.opcheck(block_attention, (*qkv, None))
    torch.library.opcheck(block_attention, (*qkv, documents(2, 12)))
    torch.library.opcheck(block_attention, (*qkv, documents(2, 12), 0.3, torch.tensor([5])))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_dropout_leaves_the_same_out_on_the_way_back(masked: bool) -> None:
    """With one value at each key that no other has, an output says which probabilities were left out."""
    rows, heads, tokens = 2, 2, 20
    q, k, _, grad = inputs(rows, heads, 1, tokens, tokens, torch.float64)
    v = torch.eye(tokens, dtype=torch.float64).expand(rows, 1, tokens, tokens).clone()
    mask, share, seed = documents(rows, tokens) if masked else None, 0.25, torch.tensor([7])
    for x in (q, k, v):
        x.requires_grad_()
    ours: Tensor = block_attention(q, k, v, mask, share, seed)
    may_look = torch.ones(tokens, tokens, dtype=torch.bool).tril() if mask is None else mask
    scores = (q @ k.mT * tokens**-0.5).masked_fill(~may_look, -torch.inf)
    kept = (ours.detach() != 0) / (1 - share)  # (B, H, T, T)
    theirs = (scores.softmax(-1) * kept) @ v
    torch.testing.assert_close(ours, theirs)
    got, expected = (torch.autograd.grad(y, (q, k, v), grad) for y in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # sums for keys and values are in float32
    looked = may_look.expand_as(kept)
    assert 0.65 < kept[looked].count_nonzero() / looked.sum() < 0.85


def dropping(dropout: float) -> Attention:
    return Attention(
        from_scratch("gpt2", vocab_size=9, d_model=16, num_layers=1, num_heads=2, max_seq_len=8, dropout=dropout)
    )


def test_each_layer_and_step_leaves_out_something_else() -> None:
    layer = dropping(0.5).to(torch.bfloat16)
    x = torch.randn(2, 8, 16, dtype=torch.bfloat16)
    torch.manual_seed(3)
    first, second = layer(x, None, None), layer(x, None, None)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(layer(x, None, None), first)
    torch.testing.assert_close(layer.eval()(x, None, None), layer(x, None, None), rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_when_a_layer_uses_it(dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, share: float, seed: Tensor | None) -> Tensor:
        shares.append(share)
        return block_attention(q, k, v, mask, share, seed)  # type: ignore[no-any-return]

    monkeypatch.setattr("seedbed.model.attention.block_attention", counted)
    layer = dropping(dropout).to(dtype)
    x = torch.randn(2, 8, 16, dtype=dtype)
    layer(x, None, None)
    layer.eval()(x, None, None)
    assert shares == ([dropout, 0.0] if dtype == torch.bfloat16 else [])
