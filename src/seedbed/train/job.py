"""Everything the loop needs, put together by `train/build.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from seedbed import distributed
from seedbed.config import SamplingOptions, TrainingOptions, WatchOptions
from seedbed.data.batches import Batch, collate
from seedbed.data.rows import NO_TARGET, Row, Rows
from seedbed.data.streaming import StreamedRows
from seedbed.device import Precision
from seedbed.model.decoder import Decoder
from seedbed.parallel import Spread
from seedbed.runs.folder import RunFolder
from seedbed.schedule import Schedule
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.board import Board
from seedbed.train.continual.anchors import PredictionAnchor, WeightAnchor
from seedbed.train.guard import Guard
from seedbed.train.length import steps_per_epoch
from seedbed.train.progress import Display
from seedbed.train.state import TrainingState
from seedbed.train.stopping import StopRequest

SAMPLE = SamplingOptions(max_new_tokens=60)
"""What a model writes at each validation."""


@dataclass(frozen=True)
class Validation:
    """Held-out rows and what they are worth in bytes."""

    rows: Rows
    num_documents: int
    num_bytes: int
    """Of what the targets stand for."""

    def bits_per_byte(self, loss: float) -> float:
        """`loss` (nats per target) as bits per byte of the text, which compares across tokenizers."""
        return loss * self.rows.num_targets / (self.num_bytes * math.log(2))


@dataclass(frozen=True)
class Earlier:
    """Held-out text of something the model knew when the run began, and its loss then."""

    domain: str
    validation: Validation
    loss: float


@dataclass(frozen=True)
class Prompt:
    """A text for people, and what the model is given for it: the text, or its tokens in the chat template."""

    shown: str
    given: str | Sequence[int]


def nothing_more(_job: Job, _display: Display, _request: StopRequest) -> bool:
    """How most runs conclude."""
    return True


@dataclass(frozen=True)
class Keeping:
    """What holds a model to what it knew, and how that is watched; most runs have nothing of it."""

    weight_anchors: Sequence[WeightAnchor] = ()
    prediction_anchors: Sequence[PredictionAnchor] = ()
    earlier: Sequence[Earlier] = ()
    """Measured at each validation beside what is being learnt."""
    max_forgetting: float = math.inf
    """The most that the loss of anything earlier may rise, as a share."""
    on_forgetting: Literal["roll_back", "stop", "warn"] = "warn"
    companions: Path | None = None
    """A folder whose files every checkpoint carries in its `seedbed/`."""
    conclude: Callable[[Job, Display, StopRequest], bool] = nothing_more
    """What is left to do once the last step is done; False when a signal cut it short."""


NOTHING_TO_KEEP = Keeping()


@dataclass
class Job:
    """A run, ready to go: the loop does not know by which method it was set up."""

    model: Decoder
    spread: Spread
    """The same model as the processes share it, for steps that learn."""
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
    keeping: Keeping
    facts: Mapping[str, Any]
    """What `metrics.json` says of the model and the text besides."""
    results: dict[str, Any] = field(default_factory=dict)
    """Figures for `metrics.json` that not every run has."""
    guard: Guard = field(default_factory=Guard)

    @property
    def micro_batch_size(self) -> int:
        """Rows at once: as configured, or fewer since those ran out of memory."""
        configured = self.training.batch_size
        return min(self.state.micro_batch_size or configured, configured)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.training, self.rows)

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's batches of update number `step` (from 0), of B rows each; the last may be smaller."""
        start, end = self.rows_of(step)
        return list(own_batches(self.rows, step // self.steps_per_epoch, start, end, self.micro_batch_size))

    def all_batches(self, step: int) -> list[Batch]:
        """The batches of an update as one process alone would make them."""
        start, end = self.rows_of(step)
        return list(batches_of(self.rows, step // self.steps_per_epoch, start, end, self.micro_batch_size))

    def rows_of(self, step: int) -> tuple[int, int]:
        """The first row of update number `step` in its epoch, and the first one after it."""
        size = self.training.rows_per_step
        start = step % self.steps_per_epoch * size
        return start, min(start + size, len(self.rows))


def batches_of(rows: Rows, epoch: int, start: int, end: int, batch_size: int) -> Iterator[Batch]:
    """Rows `start` to `end` of an epoch, `batch_size` at a time."""
    for first in range(start, end, batch_size):
        yield collate([rows.row(epoch, index) for index in range(first, min(first + batch_size, end))])


def own_batches(rows: Rows, epoch: int, start: int, end: int, batch_size: int) -> Iterator[Batch]:
    """This process's part of rows `start` to `end` of an epoch, in as many batches as every other makes of its part.

    One that has fewer rows goes through the motions with a row that teaches nothing, since all wait for each other.
    """
    wanted = -(-distributed.largest_share(end - start) // batch_size)
    if isinstance(rows, StreamedRows) and not rows.has(end):
        distributed.together(lambda: rows.reach(end))  # the next shard takes longer than a collective waits
    first, last = distributed.share(start, end)
    yield from batches_of(rows, epoch, first, last, batch_size)
    for _ in range(wanted - -(-(last - first) // batch_size)):
        yield collate([_without_targets(rows.row(epoch, start))])


def _without_targets(row: Row) -> Row:
    return replace(row, labels=np.full_like(row.labels, NO_TARGET))
