"""Cross-entropy and divergence straight from hidden states: the logits of a whole batch never exist.

N tokens   n tokens of one chunk   n' with padding   m tokens of one block   D d_model   V vocabulary

The logits of 8 sequences of 1,024 tokens over GPT-2's vocabulary are 1.6 GB in float32, and their gradient as
much again. Here a chunk of them is made, turned into losses and gradients where it stands, and forgotten. Chunks
are long, for each of them reads the whole vocabulary. What comes between their products is done in float32, in
blocks so short that they stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seedbed.data.rows import NO_TARGET
from seedbed.device import product_type

# The most tokens, and bytes of float32 logits, in one chunk. Short ones also keep sums over tokens inside the range
# of float16.
CPU_CHUNK: Final = (1024, 256 << 20)
GPU_CHUNK: Final = (4096, 256 << 20)
CPU_BLOCK: Final = 6 << 20  # bytes of float32 logits; on a GPU a block is the whole chunk
CHUNK_STEP: Final = 64  # chunks are filled up to a multiple: torch keeps code and memory for every shape of a product
VOCABULARY_SLICE: Final = 8192  # rows of the weight whose gradient from a chunk is in memory at once

_CrossEntropy = Callable[[Tensor, Tensor, torch.dtype, bool], Tensor]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, compiled: bool = False) -> Tensor:
    """Sum of the nats of every label, with gradients for `hidden` and `weight`.

    The same as `F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")`. Products run in the
    type of autocast where it is on; the log-sum-exp and the sums are in float32 (float64 for float64 weights).

    Args:
        hidden: (N, D).
        weight: (V, D).
        labels: (N,), NO_TARGET where nothing is predicted.
        compiled: on a GPU, put what comes between the products through torch.compile. On a CPU that gains nothing.
    """
    wanted = _wanted(hidden, weight)
    chunks = _chunks(hidden, weight, labels)
    losses = _cross_entropies(chunks, _sum_type(weight), gradient=any(wanted), compiled=compiled)
    return _sum(hidden, weight, losses, wanted)


def linear_kl_divergence(
    hidden: Tensor, weight: Tensor, old_hidden: Tensor, old_weight: Tensor, labels: Tensor
) -> Tensor:
    """Sum of KL(old || new) in nats over the places that have a label, with gradients for `hidden` and `weight`.

    With p = softmax(old_hidden @ old_weight.T) and q = softmax(hidden @ weight.T) it is the sum of
    p (log p - log q), and its gradient by the new logits is q - p (distillation: Hinton et al., 2015). Types are
    those of `linear_cross_entropy`. It costs the products of two heads.

    Args:
        hidden: (N, D).
        weight: (V, D).
        old_hidden: (N, D'), constant, like `old_weight`; the widths may differ, the vocabularies not.
        old_weight: (V, D').
        labels: (N,), NO_TARGET where nothing is compared.
    """
    assert len(weight) == len(old_weight), f"vocabularies of {len(weight)} and {len(old_weight)}"
    new, old = _chunks(hidden, weight, labels), _chunks(old_hidden, old_weight, labels)
    return _sum(hidden, weight, _divergences(new, old, _sum_type(weight)), _wanted(hidden, weight))


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Nats of each label, (N,) float32, 0 where the label is NO_TARGET; no gradient. Arguments as above."""
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    for chunk, nats in _cross_entropies(_chunks(hidden, weight, labels), torch.float32, gradient=False):
        losses[chunk.rows] = nats
    return losses


def _wanted(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether each of the two gets a gradient."""
    grad = torch.is_grad_enabled()
    return grad and hidden.requires_grad, grad and weight.requires_grad


def _sum_type(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _sum(hidden: Tensor, weight: Tensor, losses: _Losses, wanted: tuple[bool, bool]) -> Tensor:
    """The nats of all chunks, which come from `hidden` and `weight`, added up."""
    return _Sum.apply(hidden, weight, losses, wanted)  # type: ignore[no-any-return,no-untyped-call]


class _Sum(torch.autograd.Function):
    """Gradients are made in the forward pass, while the logits are there, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, losses: _Losses, wanted: tuple[bool, bool]) -> Tensor:
        sums = _sum_type(weight)
        d_hidden = torch.zeros_like(hidden) if wanted[0] else None  # (N, D)
        d_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None  # (V, D)
        total = torch.zeros((), dtype=sums, device=hidden.device)
        for chunk, nats in losses:
            total += nats.sum()
            d_logits = chunk.logits  # (n', V), zeros where it is filled up
            if d_hidden is not None:
                d_hidden[chunk.rows] = (d_logits @ chunk.weight)[: len(nats)].to(hidden.dtype)
            if d_weight is not None:
                for symbols in _slices(len(d_weight), VOCABULARY_SLICE):
                    d_weight[symbols] += d_logits[:, symbols].T @ chunk.hidden
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        ctx.gradients = d_hidden, d_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        assert ctx.gradients is not None, "the gradients are scaled in place, so there is one backward"
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        return (
            None if d_hidden is None else d_hidden.mul_(grad),
            None if d_weight is None else d_weight.mul_(grad),
            None,
            None,
        )


@dataclass(frozen=True)
class _Chunk:
    """A few tokens that are predicted, and their logits, over which the gradient is written."""

    rows: Tensor | slice  # where they stand among the N tokens
    labels: Tensor  # (n, 1)
    hidden: Tensor  # (n', D), in the type of the products, like weight and logits
    weight: Tensor  # (V, D)
    logits: Tensor  # (n', V)


_Losses = Iterator[tuple[_Chunk, Tensor]]  # chunks, whose logits are their gradient by then, and their nats (n,)


def _cross_entropies(chunks: Iterator[_Chunk], sums: torch.dtype, *, gradient: bool, compiled: bool = False) -> _Losses:
    """The gradient by the logits is softmax less the label."""
    for chunk in chunks:
        one_pass = compiled and chunk.logits.device.type == "cuda"
        cross_entropy = _compiled() if one_pass else _cross_entropy
        nats = [cross_entropy(chunk.logits[rows], chunk.labels[rows], sums, gradient) for rows in _blocks(chunk)]
        yield chunk, torch.cat(nats)


def _cross_entropy(logits: Tensor, label: Tensor, sums: torch.dtype, gradient: bool) -> Tensor:
    """(m, V) and (m, 1) to nats (m,); with `gradient`, that is written over the logits."""
    x = logits.to(sums)  # (m, V)
    of_label, top = x.gather(1, label), x.amax(1, keepdim=True)  # (m, 1)
    z = x.sub_(top).exp_().sum(1, keepdim=True)  # (m, 1)
    if gradient:
        p = x.div_(z)
        logits.copy_(p.scatter_add_(1, label, p.new_tensor(-1.0).expand(label.shape)))
    return (z.log() + top - of_label).squeeze(1)


@cache
def _compiled() -> _CrossEntropy:
    """A GPU waits for its memory, and these kernels need a fifth of its bytes."""
    return torch.compile(_cross_entropy_to_compile)


def _cross_entropy_to_compile(logits: Tensor, label: Tensor, sums: torch.dtype, gradient: bool) -> Tensor:
    """`_cross_entropy` as one expression, of which two kernels can be made."""
    x = logits.to(sums)  # (m, V)
    top = x.amax(1, keepdim=True)  # (m, 1)
    e = (x - top).exp()  # (m, V)
    z = e.sum(1, keepdim=True)  # (m, 1)
    nats = z.log() + top - x.gather(1, label)
    if gradient:
        p = e / z
        symbols = torch.arange(p.shape[1], device=p.device)
        logits.copy_(torch.where(symbols == label, p - 1, p))
    return nats.squeeze(1)


def _divergences(new: Iterator[_Chunk], old: Iterator[_Chunk], sums: torch.dtype) -> _Losses:
    """The gradient by the new logits is new less old probabilities."""
    for chunk, old_chunk in zip(new, old, strict=True):
        nats = [_divergence(chunk.logits[rows], old_chunk.logits[rows], sums) for rows in _blocks(chunk)]
        yield chunk, torch.cat(nats)


def _divergence(logits: Tensor, old_logits: Tensor, sums: torch.dtype) -> Tensor:
    """(m, V) twice to nats (m,); the gradient is written over the new logits."""
    log_new, log_old = (x.to(sums).log_softmax(1) for x in (logits, old_logits))
    p_old = log_old.exp()  # (m, V)
    nats = log_old.sub_(log_new).mul_(p_old).sum(1)
    logits.copy_(log_new.exp_().sub_(p_old))
    return nats


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[_Chunk]:
    """One after another in the same memory."""
    dtype = product_type(weight)
    kept = (labels != NO_TARGET).nonzero().squeeze(1)  # (N',)
    everything = len(kept) == len(labels)
    size = chunk_tokens(weight.shape[0], weight.device.type)
    weight = weight.to(dtype)  # once, not once a chunk
    memory = weight.new_empty(_filled_up(len(kept), size), len(weight))  # (n', V)
    for start in range(0, len(kept), size):
        rows = slice(start, start + size) if everything else kept[start : start + size]
        label = labels[rows, None]
        h = weight.new_zeros(_filled_up(len(label), size), weight.shape[1])
        h[: len(label)] = hidden[rows]
        yield _Chunk(rows, label, h, weight, torch.mm(h, weight.T, out=memory[: len(h)]))


def _filled_up(tokens: int, size: int) -> int:
    return min(size, -(-tokens // CHUNK_STEP) * CHUNK_STEP)


def chunk_tokens(vocab_size: int, device: str) -> int:
    """How many tokens have their logits in memory at once."""
    tokens, size = CPU_CHUNK if device == "cpu" else GPU_CHUNK
    return max(1, min(tokens, size // (4 * vocab_size)))


def _blocks(chunk: _Chunk) -> Iterator[slice]:
    tokens, vocab_size = len(chunk.labels), len(chunk.weight)
    block = max(1, CPU_BLOCK // (4 * vocab_size)) if chunk.logits.device.type == "cpu" else tokens
    return _slices(tokens, block)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
