"""Cross-entropy straight from hidden states: the logits of a whole batch never exist.

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
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, labels, wanted)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Nats of each label, (N,) float32, 0 where the label is -100; no gradient. Arguments as above."""
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(hidden, weight, labels):
        losses[chunk.rows] = chunk.nats
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made on the way forward, while the logits are there, and scaled on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, wanted: tuple[bool, bool]) -> Tensor:
        d_hidden = torch.zeros_like(hidden) if wanted[0] else None  # (N, D)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None  # (V, D)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(hidden, weight, labels):
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
    """A few tokens that are predicted, their logits in float32, and what follows from them."""

    rows: Tensor | slice  # where they stand among the N tokens
    hidden: Tensor  # (n, D), in the type of the products, like weight
    weight: Tensor  # (V, D)
    labels: Tensor  # (n, 1)
    logits: Tensor  # (n, V), float32
    log_z: Tensor  # (n, 1)
    nats: Tensor  # (n,)

    def gradient(self) -> Tensor:
        """Softmax less the label, (n, V), written over the logits."""
        p = self.logits.sub_(self.log_z).exp_()  # (n, V)
        p.scatter_add_(1, self.labels, p.new_tensor(-1.0).expand(self.labels.shape))
        return p.to(self.hidden.dtype)


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[_Chunk]:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    size = chunk_tokens(weight.shape[0], device)
    kept = (labels != IGNORE).nonzero().squeeze(1)  # (N',)
    everything = len(kept) == len(labels)
    weight = weight.to(dtype)  # once, not once a chunk
    for start in range(0, len(kept), size):
        rows = slice(start, start + size) if everything else kept[start : start + size]
        h, target = hidden[rows].to(dtype), labels[rows, None]
        logits = (h @ weight.T).float()  # (n, V)
        log_z = logits.logsumexp(1, keepdim=True)  # (n, 1)
        nats = (log_z - logits.gather(1, target)).squeeze(1)  # (n,)
        yield _Chunk(rows, h, weight, target, logits, log_z, nats)


def chunk_tokens(vocab_size: int, device: str) -> int:
    """How many tokens have their logits in memory at once."""
    tokens, size = CPU_CHUNK if device == "cpu" else GPU_CHUNK
    return max(1, min(tokens, size // (4 * vocab_size)))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total` (float32) plus `a @ b`, summed in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += a @ b
