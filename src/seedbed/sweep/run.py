"""A sweep from its file to its table: starts runs, stops the worse ones, goes on where it was stopped."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from seedbed.disk import expanded, write_atomically
from seedbed.errors import ConfigError, RunInUseError
from seedbed.runs.columns import status
from seedbed.runs.folder import being_made, update_summary
from seedbed.runs.info import is_run, read_run
from seedbed.streams import outlasting_readers
from seedbed.sweep.children import Children, make_slots
from seedbed.sweep.halving import judge
from seedbed.sweep.plan import Plan, changes, make_plan
from seedbed.sweep.results import Ended, how_it_ended, log_of, show_results
from seedbed.sweep.standing import has_ended, has_reached
from seedbed.sweep.watch import Watch
from seedbed.train.stopping import StopRequest, listen_for_signals

PAUSE = 0.2  # seconds between looks at the runs
WAIT = 3.0  # seconds before another look at a run that another process is training
ENDED_WELL = (0, 75)
HALVED = "stopped_by_halving"


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    folder: Path
    exit_code: int
    runs: tuple[Ended, ...]

    def to_json(self) -> dict[str, Any]:
        return {"sweep": str(self.folder), "runs": [run.to_json() for run in self.runs]}


def run_sweep(
    file: str | Path, output: str | Path | None = None, at_once: int | None = None, console: Console | None = None
) -> SweepResult:
    """Train every run of a sweep's file that is not finished yet, then write the table and the page that compares them.

    Each run is a process of its own; its folder is `output` / its name. Stopped in whatever way, the same call goes on.

    Args:
        file: the sweep, in YAML; see docs/sweep.md.
        output: the sweep's folder; by default runs/ and the name of the file.
        at_once: runs at a time; by default as many as GPUs, and one on a CPU.
        console: where to say how it goes; by default standard output.

    Raises:
        ConfigError: everything that is wrong with the file, or what changed in it, before any run is started.
        StorageError: the folder cannot be written.
        OSError: no folder can have its name.
    """
    console = console or Console()
    folder = folder_of(file, output)
    plan = make_plan(Path(file), folder)
    remarks = changes(plan, folder)
    with being_made("the sweep's folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "sweep.yaml", plan.to_yaml())
    slots = make_slots(at_once, {run.config.training.device for run in plan.runs.values()})
    with (
        outlasting_readers(),
        Children(slots) as children,
        Watch(console, plan, folder, len(slots)) as watch,
        listen_for_signals() as request,
    ):
        for remark in [*remarks, *watch.so_far()]:
            watch.line(remark)
        sweep = Sweep(plan, folder, children, watch, request)
        sweep.run()
    runs = tuple(how_it_ended(name, folder) for name in plan.runs)
    if request.heard():
        watch.line(f"Stopped; the same command goes on. So far: {folder}")
        return SweepResult(folder, request.exit_code, runs)
    show_results(plan, folder, sweep.failed, console)
    nothing = len(sweep.failed) == len(plan.runs)
    return SweepResult(folder, next(iter(sweep.failed.values())) if nothing else 0, runs)


def folder_of(file: str | Path, output: str | Path | None) -> Path:
    """The sweep's folder.

    Raises:
        ConfigError: there is a run in it.
    """
    folder = Path(expanded(output)) if output is not None else Path("runs") / Path(file).stem
    if is_run(folder):
        raise ConfigError(f"{folder} holds a run, and a sweep needs a folder of its own; choose another --output")
    return folder


@dataclass
class Sweep:
    """One sitting at a sweep. How far its runs are stands in their folders alone."""

    plan: Plan
    folder: Path
    children: Children
    watch: Watch
    request: StopRequest
    failed: dict[str, int] = field(default_factory=dict)
    """Exit codes of runs that broke off in this sitting."""
    _waits: dict[str, float] = field(default_factory=dict)
    """Runs that another process is training, and when to look again."""

    def run(self) -> None:
        """Bring all runs to each rung and then the better ones to their ends; a signal ends it early."""
        names = list(self.plan.runs)
        halving = self.plan.halving
        for rung in halving.rungs if halving else ():
            self.bring(names, rung)
            if self.request.heard():
                return
            names = self.keep_better(names, rung)
        self.bring(names, None)

    def bring(self, names: list[str], rung: int | None) -> None:
        """Train these runs until step `rung`, or to their ends."""
        waiting = [name for name in names if name not in self.failed]
        while waiting or self.children.going:
            if self.request.heard() and self.request.signal:
                self.children.pass_on(self.request.signal)
                waiting.clear()
            self.start_what_can(waiting, rung)
            time.sleep(PAUSE)
            for name, code in self.children.ended():
                self.close(name, code, rung, waiting)
            self.watch.show(self.children.going)

    def start_what_can(self, waiting: list[str], rung: int | None) -> None:
        for name in list(waiting):
            if self.children.full:
                return
            if self.may_start(name, waiting):
                waiting.remove(name)
                if not self.is_done(name, rung):
                    self.start(name, rung)

    def is_done(self, name: str, rung: int | None) -> bool:
        path = self.folder / name
        return has_ended(path, self.plan.runs[name]) or (rung is not None and has_reached(path, rung))

    def may_start(self, name: str, waiting: list[str]) -> bool:
        """Whether its parent's options are on disk or will never be, and nobody else trains it."""
        parent = self.plan.runs[name].parent
        if parent in (*waiting, *self.children.going) and not is_run(self.folder / parent):
            return False
        if time.monotonic() < self._waits.get(name, 0):
            return False
        if self.is_in_use(name):
            self.wait_for(name)
            return False
        return True

    def is_in_use(self, name: str) -> bool:
        return is_run(self.folder / name) and status(read_run(self.folder / name)) == "running"

    def wait_for(self, name: str) -> None:
        if name not in self._waits:
            self.watch.line(f"{name}: another process is training it; waiting")
        self._waits[name] = time.monotonic() + WAIT

    def start(self, name: str, rung: int | None) -> None:
        run = self.plan.runs[name]
        parent = self.folder / run.parent if run.parent and is_run(self.folder / run.parent) else None
        words = run.words(self.plan.verb, self.folder / name, parent=parent, stop_at_step=rung)
        self.children.start(name, words, log_of(self.folder, name))
        self.watch.started(name, rung)

    def close(self, name: str, code: int, rung: int | None, waiting: list[str]) -> None:
        """Take note of how a run's process ended."""
        run = how_it_ended(name, self.folder)
        ended = has_ended(run.run, self.plan.runs[name])
        said = run.status if ended or rung is None else f"step {rung}"
        if run.val_loss is not None:
            said += f", best validation loss {run.val_loss:.4f}"
        if code == RunInUseError.exit_code:
            waiting.insert(0, name)
            said = "put off"
            self.wait_for(name)
        elif code not in ENDED_WELL and not self.request.heard():
            self.failed[name] = code
            ended, said = True, f"failed with exit code {code}, see {run.log}"
        self.watch.stopped(name, said, ended=ended)

    def keep_better(self, names: list[str], rung: int) -> list[str]:
        """The runs that go on after a rung; it is written into the folders of the others that they do not."""
        assert self.plan.halving is not None
        judged = judge([self.plan.runs[name] for name in names], self.folder, rung, self.plan.halving.keep)
        for name, reason in judged.stopped.items():
            self.watch.line(f"{name}: {reason}")
            path = self.folder / name
            if not has_ended(path, self.plan.runs[name]) and name not in self.failed and is_run(path):
                # Somebody may go on with it by hand; and a damaged summary stays as it is.
                with contextlib.suppress(RunInUseError, ConfigError):
                    update_summary(path, status=HALVED, reason=reason)
        return list(judged.better)
