"""Softmax attention on a CPU in bfloat16: products of whole blocks, which processors are fast at.

torch's own kernel for CPUs works through small tiles and is up to twice as slow. Here the scores of a block of
queries are one product, small enough for the cache. They are not kept but made again on the way back, as in
FlashAttention (Dao et al., 2022), and so is what dropout leaves of them, from its seed.

B batch   T tokens   H query heads   K key-value heads   G = H / K   E head_dim
b rows at once   N = b K   m queries of a block   S keys that it sees
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

BLOCK: Final = 256  # queries of a row whose scores are in memory at once
MASKED_BLOCK: Final = 128  # with a mask, by which short blocks see few keys: the documents of a row are short
SEEN_STEP: Final = 64  # of the keys left out: torch keeps code and memory for every shape of a product that it meets
BLOCK_BYTES: Final = 3 << 20  # of the scores of several short rows


def suits_blocks(q: Tensor) -> bool:
    """Whether `block_attention` is the faster one: measured on processors with AVX512-BF16, for 64 to 2,048 tokens."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


@torch.library.custom_op("seedbed::block_attention", mutates_args=())
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """The same as `F.scaled_dot_product_attention` with `is_causal`; scores are rounded to the type of `q`.

    Args:
        q: (B, H, T, E).
        k: (B, K, T, E).
        v: (B, K, T, E).
        mask: (B, 1, T, T), true where a token may look, which is never ahead; None is at all behind it.
        dropout: share of the probabilities that are left out.
        seed: of what is left out, one number; needed with `dropout`.

    Returns:
        (B, H, T, E), in memory as (B, T, H, E).
    """
    out, left = _like(q), _Dropout(dropout, seed)
    for rows in _rows(q):
        queries, keys, values = _by_keys(q[rows], k), k[rows].flatten(0, 1), v[rows].flatten(0, 1)  # (N, G or -, T, E)
        for block, seen, p in _probabilities(queries, keys, None if mask is None else mask[rows]):
            _put(out[rows], block, left(p)(p) @ values[:, seen])
    return out


@torch.library.custom_op("seedbed::block_attention_backward", mutates_args=())
def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output, (B, H, T, E)."""
    scale, left = q.shape[-1] ** -0.5, _Dropout(dropout, seed)
    dq, dk, dv = _like(q), _like(k), _like(v)
    for rows in _rows(q):
        queries, keys, values = _by_keys(q[rows], k), k[rows].flatten(0, 1), v[rows].flatten(0, 1)
        grads = _by_keys(grad[rows], k)  # (N, G, T, E)
        dk_sum, dv_sum = (torch.zeros(keys.shape, dtype=torch.float32) for _ in range(2))  # (N, T, E)
        for block, seen, p in _probabilities(queries, keys, None if mask is None else mask[rows]):
            g, some = _block(grads, block), left(p)  # (N, G m, E)
            dv_sum[:, seen] += some(p).mT @ g
            dp = some(g @ values[:, seen].mT)  # (N, G m, S)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk_sum[:, seen] += ds.mT @ _block(queries, block)
            _put(dq[rows], block, (ds @ keys[:, seen]).mul_(scale))
        dk[rows], dv[rows] = dk_sum.mul_(scale).view_as(dk[rows]), dv_sum.view_as(dv[rows])
    return dq, dk, dv


class _Dropout:
    """What to leave out of one block of probabilities after the other: the same again with the same seed."""

    def __init__(self, share: float, seed: Tensor | None) -> None:
        assert share == 0 or seed is not None
        self._share = share
        self._draws = None if seed is None else torch.Generator().manual_seed(int(seed))

    def __call__(self, p: Tensor) -> Callable[[Tensor], Tensor]:
        """For the next block, shaped like `p`: a function that leaves the same places out of all it is given."""
        if self._share == 0:
            return lambda x: x
        # 16 bits for each place, four at a time: an eighth of the time that torch takes to draw it.
        draws = torch.empty(-(-p.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=self._draws)
        left = draws.view(torch.int16)[: p.numel()].view_as(p) >= int(self._share * 2**16) - 2**15
        return left.to(p.dtype).div_(1 - self._share).mul


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of the queries (N, G, T, E), which keys (N, T, E) they see, and what they give to them: (N, G m, S)."""
    tokens, size = keys.shape[1:]
    length = BLOCK if mask is None else MASKED_BLOCK
    for start in range(0, tokens, length):
        block = slice(start, min(start + length, tokens))
        seen = slice(0 if mask is None else _first_seen(mask, block), block.stop)
        scores = torch.baddbmm(
            _bias(queries, block, seen, mask), _block(queries, block), keys[:, seen].mT, alpha=size**-0.5
        )
        yield block, seen, scores.softmax(-1)


def _first_seen(mask: Tensor, block: slice) -> int:
    """The first key that any query of the block may look at, or a few before it."""
    first = int(mask[:, 0, block, : block.stop].flatten(0, 1).any(0).int().argmax())
    return first - first % SEEN_STEP


def _bias(queries: Tensor, block: slice, seen: slice, mask: Tensor | None) -> Tensor:
    """0 where a query of the block may look, else minus infinity: (G m, S), with a mask (N, G m, S)."""
    pairs, groups = queries.shape[:2]
    if mask is None:
        may_look = torch.ones(block.stop - block.start, seen.stop, dtype=torch.bool).tril(block.start)  # (m, S)
        return _minus_infinity(may_look, queries.dtype).repeat(groups, 1)
    bias = _minus_infinity(mask[:, :, block, seen], queries.dtype)  # (b, 1, m, S)
    return bias.expand(-1, pairs // len(mask) * groups, -1, -1).reshape(pairs, -1, bias.shape[-1])


def _minus_infinity(may_look: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(may_look.shape, dtype=dtype).masked_fill_(~may_look, -math.inf)


def _rows(q: Tensor) -> Iterator[slice]:
    """As many rows at once as fit, and at least one."""
    rows, heads, tokens, _ = q.shape
    step = max(1, BLOCK_BYTES // (q.element_size() * heads * min(tokens, BLOCK) * tokens))
    return (slice(start, start + step) for start in range(0, rows, step))


def _by_keys(x: Tensor, k: Tensor) -> Tensor:
    """(b, H, T, E) to (N, G, T, E): query heads beside those that share their keys."""
    return x.reshape(-1, x.shape[1] // k.shape[1], *x.shape[2:])


def _block(x: Tensor, block: slice) -> Tensor:
    """(N, G, T, E) to (N, G m, E)."""
    return x[:, :, block].flatten(1, 2)


def _put(x: Tensor, block: slice, y: Tensor) -> None:
    """A block (N, G m, E) into its place in (b, H, T, E)."""
    x[:, :, block] = y.view(*x.shape[:2], -1, x.shape[-1])


def _like(x: Tensor) -> Tensor:
    """Memory for (B, H, T, E), laid out as (B, T, H, E), in which the layers around it read and write."""
    rows, heads, tokens, size = x.shape
    return x.new_empty(rows, tokens, heads, size).transpose(1, 2)


@block_attention.register_fake
def _(q: Tensor, *_others: Tensor | float | None) -> Tensor:
    return _like(q)


@block_attention_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    q, k, v, mask, ctx.dropout, seed = inputs
    ctx.save_for_backward(q, k, v, mask, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    *inputs, seed = ctx.saved_tensors
    return *block_attention_backward(grad, *inputs, ctx.dropout, seed), None, None, None


block_attention.register_autograd(_backward, setup_context=_keep)
