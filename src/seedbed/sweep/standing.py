"""How far a run of a sweep is, as its folder tells: there is no other record."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from seedbed.parsing import parse_json
from seedbed.runs.folder import FINISHED, read_records, read_summary
from seedbed.runs.info import read_run
from seedbed.sweep.plan import PlannedRun

TAIL = 4096  # bytes: room for some records


@dataclass(frozen=True)
class Progress:
    """Where a run stood when it last made a step."""

    step: int
    total_steps: int | None
    loss: float
    elapsed_hours: float
    remaining_hours: float
    """Until its own end, at its pace."""


def read_progress(run: Path) -> Progress | None:
    """None before the first step."""
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(stream.read().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = parse_json(line)
                figures = (record["train_loss"], record["elapsed_hours"], record["remaining_hours"])
                return Progress(record["step"], read_summary(run).get("total_steps"), *figures)
    return None


def has_ended(path: Path, run: PlannedRun) -> bool:
    """Whether there is nothing left to do for `run`, or nothing that would help."""
    summary = read_summary(path)
    if summary.get("status") != "time_limit":
        return summary.get("status") in (*FINISHED, "diverged")
    options = read_run(path).options
    stop = options.get("stop_at_step")
    by_the_clock = stop is None or summary.get("steps", 0) < stop
    return bool(by_the_clock and options.get("max_training_hours", 0) >= run.config.training.max_training_hours)


def validation_loss(run: Path, step: int) -> float | None:
    """The last validation loss at or before `step`, in nats per token."""
    losses = [r["val_loss"] for r in read_records(run / "metrics.jsonl") if "val_loss" in r and r["step"] <= step]
    return losses[-1] if losses else None


def has_reached(run: Path, step: int) -> bool:
    """Whether it was validated at `step` or later."""
    return any("val_loss" in record and record["step"] >= step for record in read_records(run / "metrics.jsonl"))
