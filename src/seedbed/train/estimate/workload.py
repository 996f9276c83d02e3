"""A run as far as it is known before it starts: what a forecast is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seedbed.config import STRENGTHS, Config, KeepOptions
from seedbed.data.batches import Batch
from seedbed.data.rows import Rows
from seedbed.data.streaming import StreamedRows
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder
from seedbed.train.job import batches_of

LOOKED_AT = 16  # micro-batches of an epoch, for their width


@dataclass(frozen=True)
class Workload:
    """A run as far as it is known before it starts."""

    config: Config
    shape: DecoderConfig
    rows: Rows | None = None
    held_out: Sequence[Rows] = ()
    steps: int | None = None
    """None where only the clock ends it, or without `rows`."""
    steps_done: int = 0
    seconds_used: float = 0.0
    loaded_bytes: float = 0.0
    """Of this process's memory, what is part of the run: its weights, its optimizer's state."""
    stored_bytes: float = 0.0
    """The files of pretrained weights that are still to be read."""
    processes: int = 1
    """That share the rows of a step."""
    sharded: bool = False
    """Whether they share the model too."""

    @property
    def micro_batches(self) -> int:
        """Of one process, in a step."""
        training = self.config.training
        return math.ceil(training.rows_per_step / self.processes / training.batch_size)


@dataclass(frozen=True)
class TypicalBatch:
    """A micro-batch as most of a run are, and what is known of the others."""

    batch: Batch
    width: float
    """Mean number of tokens in a row of a micro-batch."""
    widest: int
    seconds: float
    """To make a micro-batch."""


def typical_batch(run: Workload) -> TypicalBatch:
    """Some micro-batches of the first epoch; without data, one that is full of random tokens of two documents a row."""
    size, width = run.config.training.batch_size, run.config.data.max_seq_len
    if run.rows is None:
        shape = (size, width)
        ids = torch.arange(size * width).view(shape) % run.shape.vocab_size
        positions = torch.arange(width).expand(shape)
        segments = (positions >= width // 2).long() if run.config.data.packing else None
        return TypicalBatch(Batch(ids, ids, positions, segments), width, width, 0.0)
    run.rows.row(0, 0)  # the first one puts the epoch in order
    ready = run.rows.num_ready if isinstance(run.rows, StreamedRows) else len(run.rows)
    count = max(1, min(LOOKED_AT, ready // size))
    starts = [number * (ready - size) // max(1, count - 1) for number in range(count)]
    began = time.perf_counter()
    batches = [next(batches_of(run.rows, 0, max(0, at), min(at + size, len(run.rows)), size)) for at in starts]
    seconds = (time.perf_counter() - began) / count
    batches.sort(key=lambda batch: batch.input_ids.shape[1])
    widths = [batch.input_ids.shape[1] for batch in batches]
    return TypicalBatch(batches[count // 2], sum(widths) / count, widths[-1], seconds)


def sizes_of(model: Decoder) -> tuple[int, int]:
    """Weights in all, and trained ones."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, learnt in sizes if learnt)


def ways_to_keep(config: Config) -> set[str]:
    """Names of the methods that a run has on; those of `auto` as they mostly are."""
    keeping: KeepOptions = config.keeping
    named = {part.strip() for part in keeping.method.split(",")}
    ways = {name for name in STRENGTHS if getattr(keeping, name) or name in named}
    return {"l2_sp"} if not ways and named == {"auto"} and not config.with_lora else ways
