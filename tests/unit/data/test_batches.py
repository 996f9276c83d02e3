from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from seedbed.data import Row
from seedbed.data.batches import collate, cut_width
from seedbed.data.rows import NO_TARGET


def row(segments: list[int]) -> Row:
    values = np.arange(len(segments))
    return Row(values, values + 1, values, np.array(segments))


def test_rows_become_tensors() -> None:
    batch = collate([row([0, 0, 1]), row([0, 0, 0])])
    for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids):
        assert tensor is not None
        assert (tensor.shape, tensor.dtype) == ((2, 3), torch.int64)
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch.labels.tolist() == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("length", "last_targets", "width"),
    [
        (32, (4, 6), 8),
        (32, (0, 7), 8),
        (32, (8, 2), 16),
        (32, (31, 0), 32),
        (12, (9, 3), 12),
        (128, (64, 3), 80),
        (1000, (513, 600), 640),
        (1000, (900, 3), 1000),
        (32, (None, 4), 8),
        (32, (None, None), 8),
    ],
)
def test_what_follows_the_last_target_is_cut(length: int, last_targets: tuple[int | None, ...], width: int) -> None:
    """The last of all rows decides, rounded up; a mask in between stays."""
    rows = []
    for last in last_targets:
        full = row([0] * (length // 2) + [1] * (length - length // 2))
        labels = np.full(length, NO_TARGET)
        if last is not None:
            labels[[0, last]] = full.labels[[0, last]]
        rows.append(Row(full.input_ids, labels, full.position_ids, full.segment_ids))
    batch = collate(rows)
    assert batch.segment_ids is not None
    for tensor, name in (
        (batch.input_ids, "input_ids"),
        (batch.labels, "labels"),
        (batch.position_ids, "position_ids"),
        (batch.segment_ids, "segment_ids"),
    ):
        assert tensor.tolist() == [getattr(full, name)[:width].tolist() for full in rows]


def test_widths_are_few_and_near() -> None:
    """Every new width costs memory for good; every place too many costs time."""
    widths = [cut_width(tokens) for tokens in range(1, 1025)]
    assert len(set(widths)) == 8 + 4 * 4
    assert all(tokens <= width < max(tokens + 8, tokens * 5 / 4 + 1) for tokens, width in enumerate(widths, 1))


def test_segments_are_left_out_when_every_row_is_one_document() -> None:
    assert collate([row([0, 0]), row([0, 0])]).segment_ids is None


def test_a_batch_moves_to_a_device() -> None:
    moved = collate([row([0, 1])]).to("meta")
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.position_ids.device.type} == {"meta"}
    assert moved.segment_ids is not None
    assert moved.segment_ids.device.type == "meta"
    assert collate([row([0, 0])]).to("meta").segment_ids is None


def test_reading_data_does_not_load_torch() -> None:
    program = "import seedbed.data, seedbed.text, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
