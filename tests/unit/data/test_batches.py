from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from seedbed.data import Row
from seedbed.data.batches import collate


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
