"""What a person sees while a model trains: lines that stay, and on a terminal one live bar below them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from seedbed.runs.folder import FINISHED
from seedbed.train.state import TrainingState

ASKED = 60  # characters of a question that are shown

RULE = "=" * 62
T = TypeVar("T")


def perplexity(loss: float) -> float:
    """exp(loss), with a ceiling where a float would overflow."""
    return math.exp(min(loss, 700.0))


class Display:
    """Lines and a bar on `console`; without a terminal, a plain line every `log_every` steps."""

    def __init__(self, console: Console, log_every: int) -> None:
        self.console = console
        self._log_every = log_every
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not self._live,
            refresh_per_second=4,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def banner(self, title: str, facts: Mapping[str, object]) -> None:
        self.line(RULE)
        self.line(title)
        self.line(RULE)
        for name, value in facts.items():
            self.line(f"{name}: {value}")
        self.line(RULE)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Say what is being done while it lasts."""
        if not self._live:
            self.line(f"{what}...")
            yield
            return
        with self.console.status(escape(what)):
            yield

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for work that reports (bytes done, bytes in all); nothing is shown if it never reports."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            console=self.console,
            transient=True,
        )
        with bar if self._live else contextlib.nullcontext():
            task: TaskID | None = None

            def report(done: int, total: int) -> None:
                nonlocal task
                if not self._live:
                    return
                task = bar.add_task(escape(what), total=total) if task is None else task
                bar.update(task, completed=done)

            yield report

    @contextlib.contextmanager
    def counting_tokens(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for work that reports the tokens done; without a terminal, a line at its beginning."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            console=self.console,
            transient=True,
        )
        if not self._live:
            self.line(f"{what} ({total:,} tokens)...")
            yield lambda _done: None
            return
        with bar:
            task = bar.add_task(escape(what), total=total)
            yield lambda done: bar.update(task, completed=done)

    def step(self, step: int, total_steps: int | None, metrics: Mapping[str, float]) -> None:
        figures = (
            f"loss {metrics['train_loss']:.3f}  ppl {metrics['train_ppl']:.4g}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s  {clock(metrics['remaining_hours'])} left"
        )
        if self._live:
            if self._task is None:
                self._task = self._bar.add_task("Training", total=total_steps, figures="")
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % self._log_every == 0:
            self.line(f"Step {step}{'' if total_steps is None else f'/{total_steps}'}  {figures}")

    def validation(self, step: int, loss: float) -> None:
        self.line(f"Step {step}  Val Loss: {loss:.4f} | Val PPL: {perplexity(loss):.2f}")

    def forgetting(self, step: int, rises: Mapping[str, float]) -> None:
        said = ", ".join(f"{domain} {rise:+.2%}" for domain, rise in rises.items())
        self.line(f"Step {step}  Loss on what it knew, against the beginning: {said}")

    def watch_validation(self, batches: Iterable[T], num_rows: int) -> Iterator[T]:
        """Pass `batches` of rows on, with a bar while they last."""
        task = self._bar.add_task("Validating", total=num_rows, figures="rows")
        try:
            for batch in batches:
                yield batch
                self._bar.advance(task, len(batch.input_ids))  # type: ignore[attr-defined]
        finally:  # also where nobody asks for the rest
            self._bar.remove_task(task)

    def sample(self, step: int, text: str, asked: str | None = None) -> None:
        """What the model wrote, where it was asked something after that."""
        question = "" if asked is None else f", asked {shorten(asked, ASKED, placeholder=' …')!r},"
        shown = f"Step {step}{question} writes: {' '.join(text.split())}"
        self.console.print(shown, style="dim", markup=False, highlight=False, soft_wrap=True)

    def epoch(self, epoch: int, epochs: int | None, state: TrainingState) -> None:
        train_loss = state.epoch_loss_sum / max(1, state.epoch_tokens)
        self.line()
        self.line(f"Epoch {epoch}{'' if epochs is None else f'/{epochs}'}")
        self.line(f"  Train Loss: {train_loss:.4f} | Train PPL: {perplexity(train_loss):.2f}")
        if state.val_loss is None:
            return
        self.line(f"  Val Loss:   {state.val_loss:.4f} | Val PPL:   {perplexity(state.val_loss):.2f}")
        if state.best_step == state.step:
            best = f"val_loss: {state.val_loss:.4f}, val_ppl: {perplexity(state.val_loss):.2f}"
            self.line(f"  ✓ New best checkpoint saved ({best})")
        elif state.epochs_without_improvement:
            self.line(f"  No improvement for {state.epochs_without_improvement} epoch(s)")

    def closing(self, summary: Mapping[str, Any], run: Path) -> None:
        """The last lines: how it ended, which weights are best and where they are."""
        minutes = summary["hours"] * 60
        self.line()
        match summary["status"]:
            case "done":
                self.line(f"Training complete! Time: {minutes:.2f} minutes")
            case "early_stopped":
                why = summary["reason"] or "no better validation loss"
                self.line(f"Stopped early: {why}. Time: {minutes:.2f} minutes")
                if summary["best_step"]:
                    self.line(f"final/ holds the best weights, those of step {summary['best_step']}")
            case "time_limit" if not summary["steps"]:
                self.line("The time was up before the first step: nothing was trained, and nothing is saved")
                self.line("The same command with more --max_training_hours begins anew")
            case "interrupted" if not summary["steps"]:
                self.line("Interrupted before the first step: nothing was trained, and nothing is saved")
                self.line("The same command begins anew")
            case "time_limit" if summary["reason"]:
                self.line(
                    f"Stopped at step {summary['steps']} ({summary['reason']}), saved to {run}/checkpoints/time-limit"
                )
                self.line("The same command without it goes on from there")
            case "time_limit":
                self.line(f"Time limit reached after {summary['hours']:.2f}h, saved to {run}/checkpoints/time-limit")
                self.line("The same command with more --max_training_hours goes on from there")
            case "interrupted":
                self.line(f"Interrupted and saved at step {summary['steps']}; the same command goes on from there")
        if summary["best_step"] is not None and summary["best_val_loss"] is not None:
            self.line(
                f"Best model: step {summary['best_step']} with validation loss {summary['best_val_loss']:.4f} "
                f"(perplexity {summary['best_val_ppl']:.2f}, {summary['bits_per_byte']:.4f} bits per byte)"
            )
            self.line(f"Best checkpoint available at: {run}/checkpoints/best")
        elif summary["status"] in FINISHED:
            self.line(f"Model available at: {run}/checkpoints/final")
        if summary["status"] in FINISHED:
            chat = " --chat" if summary["text"]["conversations"] else ""
            self.line(f"Try it: seedbed generate --model {run}{chat} --prompt '...'")
        if summary["status"] == "done":
            self.line(against_forecast(summary))


def against_forecast(summary: Mapping[str, Any]) -> str:
    """What was expected before the first step, and what came."""
    expected, hours = summary["forecast"], summary["forecast"]["hours"]
    time = "" if hours is None else f"time {clock(hours)}, was {clock(summary['hours'])}; "
    return f"Forecast: {time}peak memory {expected['peak_memory_mb']:,.0f} MB, was {summary['peak_memory_mb']:,.0f} MB"


def clock(hours: float) -> str:
    """Hours as `1:02:03`, or `2:03` below one hour."""
    minutes, seconds = divmod(round(hours * 3600), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
