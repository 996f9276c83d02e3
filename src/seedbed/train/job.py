"""Everything the loop needs, put together by `train/build.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seedbed.config import TrainingOptions, WatchOptions
from seedbed.data.batches import Batch, collate
from seedbed.data.rows import PackedRows, WholeRows
from seedbed.device import Precision
from seedbed.model.decoder import Decoder
from seedbed.runs.folder import RunFolder
from seedbed.schedule import Schedule
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.board import Board
from seedbed.train.state import TrainingState

Rows = PackedRows | WholeRows


@dataclass(frozen=True)
class Validation:
    """Held-out rows and what they are worth in bytes."""

    rows: Rows
    num_documents: int
    num_bytes: int

    def bits_per_byte(self, loss: float) -> float:
        """`loss` (nats per target) as bits per byte of the text, which compares across tokenizers."""
        return loss * self.rows.num_targets / (self.num_bytes * math.log(2))


@dataclass(frozen=True)
class Prompt:
    """A text for people, and what the model is given for it: the text, or its tokens in the chat template."""

    shown: str
    given: str | Sequence[int]


@dataclass
class Job:
    """A run, ready to go: the loop does not know by which method it was set up."""

    model: Decoder
    forward: Callable[..., Tensor]
    """The model, compiled when that was asked for."""
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    rows: Rows
    validation: Validation | None
    device: torch.device
    precision: Precision
    training: TrainingOptions
    watching: WatchOptions
    run: RunFolder
    board: Board
    state: TrainingState
    epochs: int | None
    total_steps: int | None
    """None, like `epochs`, when only the clock ends the run."""
    parent: str | None
    """The checkpoint or pretrained model this run began from."""
    sample: Prompt
    """What the model continues, or answers, at each validation."""

    @property
    def rows_per_step(self) -> int:
        return self.training.batch_size * self.training.grad_accumulation

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    def micro_batches(self, step: int) -> list[Batch]:
        """The batches of update number `step` (from 0), of B rows each; the last of an epoch may be smaller."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.rows_per_step
        end = min(start + self.rows_per_step, len(self.rows))
        return list(batches_of(self.rows, epoch, start, end, self.training.batch_size))


def batches_of(rows: Rows, epoch: int, start: int, end: int, batch_size: int) -> Iterator[Batch]:
    """Rows `start` to `end` of an epoch, `batch_size` at a time."""
    for first in range(start, end, batch_size):
        yield collate([rows.row(epoch, index) for index in range(first, min(first + batch_size, end))])
