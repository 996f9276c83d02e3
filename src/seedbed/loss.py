"""Cross-entropy and divergence straight from hidden states: the logits of a whole batch never exist.

N tokens   n tokens of one chunk   D d_model   V vocabulary

The logits of 8 sequences of 1,024 tokens over GPT-2's vocabulary are 1.6 GB in float32, and their gradient as
much again. Here a chunk of them is made, turned into losses and gradients, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE: Final = -100  # the label of a token that is not predicted
# The most tokens, and bytes of float32 logits, in one chunk. On a CPU smaller and larger ones measured slower
# (vocabularies of 65 to 50,257). Short chunks also keep sums over tokens inside the range of float16.
CPU_CHUNK: Final = (1024, 64 << 20)
GPU_CHUNK: Final = (4096, 256 << 20)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the nats of every label, float32, with gradients for `hidden` and `weight`.

    The same as `F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")`. Products run in the
    type of autocast where it is on; the log-sum-exp and the sums are in float32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        labels: (N,), -100 where nothing is predicted.
    """
    return _sum(hidden, weight, _chunks(hidden, weight, labels), torch.float32)


def linear_kl_divergence(
    hidden: Tensor, weight: Tensor, old_hidden: Tensor, old_weight: Tensor, labels: Tensor
) -> Tensor:
    """Sum of KL(old || new) in nats over the places that have a label, with gradients for `hidden` and `weight`.

    With p = softmax(old_hidden @ old_weight.T) and q = softmax(hidden @ weight.T) it is the sum of
    p (log p - log q), and its gradient by the new logits is q - p (distillation: Hinton et al., 2015). Types are
    those of `linear_cross_entropy`, except that float64 stays float64. It costs the products of two heads.

    Args:
        hidden: (N, D).
        weight: (V, D).
        old_hidden: (N, D'), constant, like `old_weight`; the widths may differ, the vocabularies not.
        old_weight: (V, D').
        labels: (N,), -100 where nothing is compared.
    """
    assert len(weight) == len(old_weight), f"vocabularies of {len(weight)} and {len(old_weight)}"
    sums = torch.promote_types(weight.dtype, torch.float32)
    new, old = _chunks(hidden, weight, labels, sums), _chunks(old_hidden, old_weight, labels, sums)
    return _sum(hidden, weight, _divergences(new, old), sums)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Nats of each label, (N,) float32, 0 where the label is -100; no gradient. Arguments as above."""
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(hidden, weight, labels):
        losses[chunk.rows] = chunk.nats
    return losses


def _sum(hidden: Tensor, weight: Tensor, chunks: Iterator[_Chunk] | Iterator[_Divergence], sums: torch.dtype) -> Tensor:
    """The nats of all chunks, which come from `hidden` and `weight`, added up in the type `sums`."""
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return _Sum.apply(hidden, weight, chunks, sums, wanted)  # type: ignore[no-any-return,no-untyped-call]


class _Sum(torch.autograd.Function):
    """Gradients are made on the way forward, while the logits are there, and scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        chunks: Iterator[_Chunk] | Iterator[_Divergence],
        sums: torch.dtype,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        d_hidden = torch.zeros_like(hidden) if wanted[0] else None  # (N, D)
        d_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None  # (V, D)
        total = torch.zeros((), dtype=sums, device=hidden.device)
        for chunk in chunks:
            total += chunk.nats.sum()
            if not any(wanted):
                continue
            d_logits = chunk.gradient()  # (n, V)
            if d_hidden is not None:
                d_hidden[chunk.rows] = (d_logits @ chunk.weight).to(hidden.dtype)
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, chunk.hidden)
        ctx.gradients = d_hidden, None if d_weight is None else d_weight.to(weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        assert ctx.gradients is not None, "the gradients are scaled in place, so there is one backward"
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        return (
            None if d_hidden is None else d_hidden.mul_(grad),
            None if d_weight is None else d_weight.mul_(grad),
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Chunk:
    """A few tokens that are predicted, their logits, and what follows from them."""

    rows: Tensor | slice  # where they stand among the N tokens
    hidden: Tensor  # (n, D), in the type of the products, like weight
    weight: Tensor  # (V, D)
    labels: Tensor  # (n, 1)
    logits: Tensor  # (n, V), in the type of the sums
    log_z: Tensor  # (n, 1)
    nats: Tensor  # (n,)

    def gradient(self) -> Tensor:
        """Softmax less the label, (n, V), written over the logits."""
        p = self.log_probabilities().exp_()  # (n, V)
        p.scatter_add_(1, self.labels, p.new_tensor(-1.0).expand(self.labels.shape))
        return p.to(self.hidden.dtype)

    def log_probabilities(self) -> Tensor:
        """(n, V), written over the logits."""
        return self.logits.sub_(self.log_z)


@dataclass(frozen=True)
class _Divergence:
    """A few tokens at which two predictions are compared."""

    rows: Tensor | slice  # where they stand among the N tokens
    hidden: Tensor  # (n, D), in the type of the products, like weight
    weight: Tensor  # (V, D)
    log_new: Tensor  # (n, V), log-probabilities
    p_old: Tensor  # (n, V), probabilities
    nats: Tensor  # (n,)

    def gradient(self) -> Tensor:
        """New less old probabilities, (n, V), written over the new ones' logarithms."""
        return self.log_new.exp_().sub_(self.p_old).to(self.hidden.dtype)


def _divergences(new: Iterator[_Chunk], old: Iterator[_Chunk]) -> Iterator[_Divergence]:
    for chunk, old_chunk in zip(new, old, strict=True):
        log_new, log_old = chunk.log_probabilities(), old_chunk.log_probabilities()
        p_old = log_old.exp()
        nats = log_old.sub_(log_new).mul_(p_old).sum(1)  # (n,)
        yield _Divergence(chunk.rows, chunk.hidden, chunk.weight, log_new, p_old, nats)


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor, sums: torch.dtype = torch.float32) -> Iterator[_Chunk]:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    size = chunk_tokens(weight.shape[0], device)
    kept = (labels != IGNORE).nonzero().squeeze(1)  # (N',)
    everything = len(kept) == len(labels)
    weight = weight.to(dtype)  # once, not once a chunk
    for start in range(0, len(kept), size):
        rows = slice(start, start + size) if everything else kept[start : start + size]
        h, target = hidden[rows].to(dtype), labels[rows, None]
        logits = (h @ weight.T).to(sums)  # (n, V)
        log_z = logits.logsumexp(1, keepdim=True)  # (n, 1)
        nats = (log_z - logits.gather(1, target)).squeeze(1)  # (n,)
        yield _Chunk(rows, h, weight, target, logits, log_z, nats)


def chunk_tokens(vocab_size: int, device: str) -> int:
    """How many tokens have their logits in memory at once."""
    tokens, size = CPU_CHUNK if device == "cpu" else GPU_CHUNK
    return max(1, min(tokens, size // (4 * vocab_size)))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total` plus `a @ b`, summed in the type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
