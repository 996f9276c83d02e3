"""What a model is given: B rows of T tokens as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from seedbed.data.rows import NO_TARGET, Ints, Row


@final
@dataclass(frozen=True)
class Batch:
    """B rows of T tokens; every tensor is (B, T) int64."""

    input_ids: Tensor
    labels: Tensor  # NO_TARGET where nothing is predicted: padding, and what the loss mask leaves out
    position_ids: Tensor  # restart at 0 in each document
    segment_ids: Tensor | None  # which document of its row a token belongs to; None when every row is one document

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.position_ids.to(device, non_blocking=non_blocking),
            None if self.segment_ids is None else self.segment_ids.to(device, non_blocking=non_blocking),
        )


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows of one length into a batch.

    Places after the last target of all rows decide nothing, because attention looks back only; they are cut
    (see `cut_width`).
    """
    assert rows
    labels = np.stack([row.labels for row in rows])  # (B, T)
    predicted = np.flatnonzero((labels != NO_TARGET).any(axis=0))
    width = cut_width(int(predicted[-1]) + 1 if len(predicted) else 1)

    def stacked(arrays: Sequence[Ints]) -> Tensor:
        return torch.from_numpy(np.stack([array[:width] for array in arrays]))  # (B, width)

    one_document = all(row.segment_ids[-1] == 0 for row in rows)
    return Batch(
        input_ids=stacked([row.input_ids for row in rows]),
        labels=stacked([row.labels for row in rows]),
        position_ids=stacked([row.position_ids for row in rows]),
        segment_ids=None if one_document else stacked([row.segment_ids for row in rows]),
    )


def cut_width(tokens: int) -> int:
    """The next of few widths, four from each power of two to the one after it: 64, 80, 96, 112, 128, 160, ...

    torch keeps code and memory for every shape that it meets.
    """
    step = max(8, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step
