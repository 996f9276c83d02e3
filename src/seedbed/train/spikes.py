"""When a step's loss jumps: which rows it came from, and whether the weights, the data or the precision did it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from seedbed.data.rows import NO_TARGET
from seedbed.device import Precision
from seedbed.evaluate import evaluation_mode
from seedbed.parallel import is_sharded
from seedbed.runs.noise import robust_deviation
from seedbed.train.job import Job
from seedbed.train.measure import per_token_losses

WINDOW = 50  # steps before that say what is usual
ENOUGH = 20  # of them, before anything is unusual
DEVIATIONS = 6.0  # robust standard deviations above the median
LEAST_RISE = 0.1  # of the median: a loss that hardly varies does not spike by its last digits
APART = 10  # steps between two reports, so that a loss that stays up is reported once
ROWS_NAMED = 3
SHOWN = 48  # tokens of a row that are quoted


@dataclass(frozen=True)
class Usual:
    """The median of the losses before a step, and their robust deviation."""

    loss: float
    deviation: float


class RecentLosses:
    """Losses of the last steps, in nats per target."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW)
        self._last_spike = -math.inf

    @property
    def mean(self) -> float | None:
        return sum(self._losses) / len(self._losses) if self._losses else None

    def add(self, step: int, loss: float, *, taken: bool = True) -> Usual | None:
        """Remember a step's loss if its update was taken; what was usual before it, when it stands far above that."""
        usual = self._usual()
        if taken:
            self._losses.append(loss)
        if usual is None or step - self._last_spike < APART:
            return None
        if loss <= usual.loss + max(DEVIATIONS * usual.deviation, LEAST_RISE * usual.loss):
            return None
        self._last_spike = step
        return usual

    def _usual(self) -> Usual | None:
        if len(self._losses) < ENOUGH:
            return None
        middle = median(self._losses)
        return Usual(middle, robust_deviation(self._losses, middle))


@dataclass(frozen=True)
class MeasuredRow:
    """One row of a step: its place in the epoch, its targets and their nats, and where its last target stands."""

    row: int
    tokens: int
    nats: float
    length: int
    input_ids: Tensor
    """(T,) as wide as its micro-batch."""

    @property
    def loss(self) -> float:
        return self.nats / max(1, self.tokens)


def look_at_spike(job: Job, step: int) -> dict[str, Any]:
    """What update number `step` (from 0) was made of, measured once more with the weights as they are now.

    A few rows that hold most of the loss are unusual data; rows that are all bad are broken weights; a loss that is
    lower in float32 is the precision's.
    """
    first, _ = job.rows_of(step)
    rows = measured_rows(job, step, job.precision)
    nats, places = sum(row.nats for row in rows), sum(len(row.input_ids) for row in rows)
    worst = sorted(rows, key=lambda row: -row.loss)[:ROWS_NAMED]
    # Sharded weights are gathered in bf16.
    again = job.precision != "fp32" and not is_sharded(job.model)
    in_float32 = _loss(measured_rows(job, step, "fp32")) if again else None
    return {
        "rows": [first, first + len(rows) - 1],
        "tokens": sum(row.tokens for row in rows),
        "padding": round(1 - sum(row.length for row in rows) / places, 4),
        "max_length": max(row.length for row in rows),
        "worst_rows": [
            {
                "row": first + row.row,
                "tokens": row.tokens,
                "loss": _number(row.loss),
                "text": job.tokenizer.decode(row.input_ids[:SHOWN].tolist()),
            }
            for row in worst
        ],
        "worst_share": _number(sum(row.nats for row in worst) / nats if nats else 0.0),
        "again_loss": _number(_loss(rows)),
        "float32_loss": None if in_float32 is None else _number(in_float32),
    }


def measured_rows(job: Job, step: int, precision: Precision) -> list[MeasuredRow]:
    """The rows of update number `step`, each with its loss, without dropout."""
    rows: list[MeasuredRow] = []
    with evaluation_mode(job.model):
        for batch in job.all_batches(step):
            losses = per_token_losses(job, batch.to(job.device), precision)  # (B, T)
            for labels, nats, input_ids in zip(batch.labels, losses.cpu(), batch.input_ids, strict=True):
                targets = (labels != NO_TARGET).nonzero().flatten()
                length = int(targets[-1]) + 1 if len(targets) else 0
                rows.append(MeasuredRow(len(rows), len(targets), float(nats.double().sum()), length, input_ids))
    return rows


def _loss(rows: list[MeasuredRow]) -> float:
    return sum(row.nats for row in rows) / max(1, sum(row.tokens for row in rows))


def _number(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return round(value, 4) if math.isfinite(value) else None
