"""Which tokens may look at which where a row holds several documents, and attention inside each on a GPU.

B batch   T tokens   H heads   E head_dim   N documents of all rows
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

HAS_KERNELS: Final = TorchVersion(torch.__version__) >= "2.11"  # with these arguments
LARGEST_HEAD: Final = 128  # that they train on every GPU


class Documents(NamedTuple):
    """The documents of all rows one after another, for kernels that do nothing between them."""

    bounds: Tensor  # (N + 1,) int32: where each of them begins among the B * T tokens, and the end
    segment_ids: Tensor  # (B, T)


Mask = Tensor | Documents
"""True where a token may look, (B, 1, T, T), or what says the same in less."""


def document_mask(segment_ids: Tensor | None, dtype: torch.dtype, head_dim: int) -> Mask | None:
    """Tokens see their own document up to themselves; None, if there is one in each row, is causal.

    Args:
        segment_ids: (B, T), which document a token belongs to; those of one document are neighbours.
        dtype: of queries, keys and values.
        head_dim: their size.
    """
    if segment_ids is None:
        return None
    if not suits_kernels(segment_ids.device, dtype, head_dim):
        return dense_mask(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    end = begins.new_full((1,), True)
    return Documents(torch.cat((begins.flatten(), end)).nonzero().squeeze(1).int(), segment_ids)


def dense_mask(segment_ids: Tensor) -> Tensor:
    """(B, T) to (B, 1, T, T): true where a token may look, which is back and inside its own document."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # (B, 1, T, T)
    return same.tril()


def suits_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch has FlashAttention for texts of many lengths here: on NVIDIA's GPUs since Ampere, in 16 bits."""
    return (
        device.type == "cuda"
        and HAS_KERNELS
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= LARGEST_HEAD
    )


def attend_in_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document by FlashAttention (Dao, 2023): (B, H, T, E) three times to the same."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, tokens, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, E)
    bounds = documents.bounds
    y = varlen_attn(q, k, v, bounds, bounds, tokens, tokens, window_size=(-1, 0))
    return y.view(rows, tokens, *y.shape[1:]).transpose(1, 2)  # type: ignore[union-attr]  # (B, H, T, E)
