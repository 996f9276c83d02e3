"""What the rules look at: a run folder, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seedbed.config import REGIMES, rate_range
from seedbed.runs.diagnose.smoothing import SmoothedCurve, median, smoothed
from seedbed.runs.folder import FINISHED, read_records
from seedbed.runs.info import RunInfo, read_run
from seedbed.runs.parents import find_run, parent_run
from seedbed.runs.series import NOTHING, Series, read_series
from seedbed.runs.values import is_number

FIRST_RECORDS = 5
LAST_TEXTS = 3


@dataclass(frozen=True)
class Facts:
    """A run as its folder tells it. What is missing there is None or empty, and rules then say nothing."""

    run: RunInfo
    series: Mapping[str, Series]
    events: Sequence[Mapping[str, Any]]
    texts: Sequence[str] = ()
    """What the model wrote last, oldest first."""
    parent: RunInfo | None = None
    """The run whose options or weights it began with, when that is still there."""
    origin: RunInfo | None = None
    """The run that made the model it began with, likewise."""

    # The options and the summary

    @property
    def regime(self) -> str:
        return self.run.regime

    @property
    def pretrained(self) -> bool:
        return self.regime != "scratch"

    @property
    def with_lora(self) -> bool:
        return self.regime in REGIMES and REGIMES[self.regime].with_lora

    def option(self, name: str) -> float | None:
        """An option that is a number; None when it is not set."""
        return number(self.run.options, name)

    def result(self, name: str) -> float | None:
        """An entry of the summary that is a number."""
        return number(self.run.summary, name)

    def part(self, name: str) -> Mapping[str, Any]:
        """A group of entries of the summary, such as `text` or `shape`."""
        part = self.run.summary.get(name)
        return part if isinstance(part, dict) else {}

    @property
    def status(self) -> str:
        return str(self.run.summary.get("status", "running"))

    @property
    def finished(self) -> bool:
        """It came to the end that its options set."""
        return self.status in FINISHED

    @property
    def cut(self) -> bool:
        """It came to the end of its budget of hours or steps."""
        return self.status == "time_limit"

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of one kind, oldest first; of a step that was done again after a kill, the last."""
        found = [event for event in self.events if event.get("event") == kind]
        again = {event.get("step"): event for event in found} if kind in ("skipped_step", "loss_spike") else {}
        return list(again.values()) or found

    def checkpoint(self, *names: str) -> Path | None:
        """The first of these checkpoints that is there."""
        folders = (self.run.path / "checkpoints" / name for name in names)
        return next((folder for folder in folders if folder.is_dir()), None)

    # The curves

    @property
    def train(self) -> Series:
        return self.series.get("train_loss", NOTHING)

    @property
    def val(self) -> Series:
        return self.series.get("val_loss", NOTHING)

    @cached_property
    def curve(self) -> SmoothedCurve:
        """The training loss."""
        return smoothed(self.train)

    @cached_property
    def first_loss(self) -> float:
        """Of the first steps."""
        return median(self.train[:FIRST_RECORDS])

    @property
    def steps(self) -> float:
        """Steps made, of which there is a record."""
        return float(self.train.step[-1]) if len(self.train) else 0.0

    @property
    def total_steps(self) -> float:
        """Steps planned; those made where only the clock ends the run."""
        return self.result("total_steps") or self.steps

    def loss_before(self, step: float, records: int) -> float:
        """Median training loss of the last `records` steps up to `step`; the first loss where none was recorded yet."""
        before = self.train[self.train.step <= step]
        return median(before[-records:] if len(before) else self.train[:1])

    # The learning rate

    @property
    def rates(self) -> Series:
        return self.series.get("lr", NOTHING)

    @cached_property
    def peak_rate(self) -> float | None:
        """The learning rate that the warm-up leads to."""
        return self.option("learning_rate") or (float(self.rates.values.max()) if len(self.rates) else None)

    @cached_property
    def peak_step(self) -> float:
        """Where the schedule reached its highest rate so far; 0 without a warm-up."""
        if not len(self.rates):
            return 0.0
        first = int(np.argmax(self.rates.values > 0.999 * self.rates.values.max()))
        return float(self.rates.step[first]) if first else 0.0

    @cached_property
    def learning_until(self) -> float:
        """The last step with at least a fifth of the peak rate: what is flat after it says nothing."""
        if not len(self.rates):
            return self.steps
        strong = self.rates.values >= 0.2 * self.rates.values.max()
        return float(self.rates.step[strong][-1])

    @cached_property
    def rate_range(self) -> tuple[str, float, float] | None:
        """What is being done, and the least and the greatest rate that usually goes well; of AdamW alone.

        A model trained here takes the rate of its own run again, or a little of it.
        """
        if self.run.options.get("optimizer") in ("sgd", "muon") or self.regime not in REGIMES:
            return None
        trained_at = number(self.origin.options, "learning_rate") if self.origin else None
        return REGIMES[self.regime].doing, *rate_range(self.regime, trained_at)

    @property
    def times_too_high(self) -> float:
        """The peak rate in tops of its range; 0 where no range is known."""
        return self.peak_rate / self.rate_range[2] if self.rate_range and self.peak_rate else 0.0

    @property
    def times_too_low(self) -> float:
        """The bottom of the range in peak rates."""
        return self.rate_range[1] / self.peak_rate if self.rate_range and self.peak_rate else 0.0

    @property
    def middle_rate(self) -> float | None:
        """A rate that usually goes well: the middle of the range, on its logarithmic scale, to one digit."""
        return float(f"{(self.rate_range[1] * self.rate_range[2]) ** 0.5:.0e}") if self.rate_range else None


def read_facts(path: Path | str) -> Facts:
    """Everything the rules need of a run folder, or of the run around a checkpoint.

    Raises:
        ConfigError: no such folder, or it holds no run.
    """
    run = read_run(path)
    samples = [record for record in read_records(run.path / "samples.jsonl") if isinstance(record.get("text"), str)]
    return Facts(
        run=run,
        series=read_series(run.path),
        events=list(read_records(run.path / "events.jsonl")),
        texts=[record["text"] for record in samples[-LAST_TEXTS:]],
        parent=parent_run(run),
        origin=find_run(run, run.options.get("model")) if run.regime != "scratch" else None,
    )


def number(values: Mapping[str, Any], name: str) -> float | None:
    """An entry that is a finite number, as a float."""
    value = values.get(name)
    return float(value) if isinstance(value, bool) or is_number(value) else None


def rows_of(event: Mapping[str, Any]) -> tuple[int, int] | None:
    """The first and the last row of an event's step."""
    match event.get("rows"):
        case [int(first), int(last)]:
            return first, last
    return None


def short(value: float) -> str:
    """A rate as people write it, with two digits: 0.1, 3e-4, 2.5e-5."""
    if value >= 0.01:
        return f"{float(f'{value:.2g}'):g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"
