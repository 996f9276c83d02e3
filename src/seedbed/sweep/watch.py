"""What a person sees while a sweep goes: bars on a terminal, a line at each event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console
from rich.markup import escape

from seedbed.sweep.plan import Plan
from seedbed.sweep.standing import Progress, has_ended, read_progress
from seedbed.train.progress import clock

SILENCE = 60.0  # seconds between lines where there is no terminal


class Watch:
    """The runs of `plan` below `folder`, `at_once` of them going at a time."""

    def __init__(self, console: Console, plan: Plan, folder: Path, at_once: int) -> None:
        self.console = console
        self._plan, self._folder, self._at_once = plan, folder, at_once
        self._seen: dict[str, Progress] = {}
        self._began: dict[str, tuple[float, float]] = {}
        """When runs that go were started, and the hours that they had trained by then."""
        self._beside: dict[str, float] = {}
        """Hours that runs took beside their training: to start, to end."""
        self._ended: set[str] = set()
        self._spoke = time.monotonic()
        for name, run in plan.runs.items():
            self._look(name, ended=has_ended(folder / name, run))
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._all = self._bar.add_task("Sweep", total=len(plan.runs), figures="")
        self._tasks: dict[str, bars.TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def so_far(self) -> list[str]:
        """What there is to say at the beginning of a sitting that is not the first."""
        return [f"{len(self._ended)} of {len(self._plan.runs)} runs are finished"] if self._ended else []

    def started(self, name: str, until: int | None) -> None:
        self._began[name] = time.monotonic(), self._seen[name].elapsed_hours if name in self._seen else 0.0
        place = list(self._plan.runs).index(name) + 1
        self.line(f"{name} ({place} of {len(self._plan.runs)}){'' if until is None else f' until step {until}'}...")
        self._tasks[name] = self._bar.add_task(escape(name), total=None, figures="")

    def stopped(self, name: str, said: str, *, ended: bool) -> None:
        """A run's process is over; `ended` when the run is as well."""
        self._bar.remove_task(self._tasks.pop(name))
        self._look(name, ended=ended)
        del self._began[name]
        left = self.hours_left()
        self.line(f"{name}: {said}{'' if left is None else f'; {clock(left)} left'}")

    def show(self, going: Collection[str]) -> None:
        """Bring the bars up to date; without a terminal, a line now and then."""
        if not self.console.is_terminal and time.monotonic() - self._spoke < SILENCE:
            return
        self._spoke = time.monotonic()
        left = self.hours_left()
        said = "" if left is None else f"{clock(left)} left"
        for name in going:
            self._look(name)
            if (seen := self._seen.get(name)) is None:
                continue
            figures = f"loss {seen.loss:.3f}"
            self._bar.update(self._tasks[name], completed=seen.step, total=seen.total_steps, figures=figures)
            if not self.console.is_terminal:
                self.line(f"{name}: step {seen.step}, {figures}; {said}")
        self._bar.update(self._all, completed=len(self._ended), figures=said)

    def hours_left(self) -> float | None:
        """Of the whole sweep, from what its runs took so far; None before the first step of any."""
        if not self._seen:
            return None
        whole = fmean(seen.elapsed_hours + seen.remaining_hours for seen in self._seen.values())
        done = sum(seen.elapsed_hours for seen in self._seen.values())
        beside = fmean(self._beside.values()) if self._beside else 0.0
        to_go = len(self._plan.runs) - len(self._ended)
        return (max(0.0, whole * self._runs_worth() - done) + beside * to_go) / self._at_once

    def _runs_worth(self) -> float:
        """How many whole runs the sweep is worth: with halving, few go the whole way."""
        number, halving = float(len(self._plan.runs)), self._plan.halving
        totals = [seen.total_steps for seen in self._seen.values() if seen.total_steps]
        if halving is None or not totals:
            return number
        worth, begin = 0.0, 0.0
        for end in (*(rung / fmean(totals) for rung in halving.rungs), 1.0):
            worth += number * (end - begin)
            begin, number = end, number * halving.keep
        return worth

    def _look(self, name: str, *, ended: bool = False) -> None:
        if seen := read_progress(self._folder / name):
            self._seen[name] = replace(seen, remaining_hours=0.0) if ended else seen
            if name in self._began:
                began, trained = self._began[name]
                hours = (time.monotonic() - began) / 3600
                self._beside[name] = max(0.0, hours - (seen.elapsed_hours - trained))
        if ended:
            self._ended.add(name)
