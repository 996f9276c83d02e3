"""What a sweep ends in: the table of its runs, what the differences mean, and a page that compares them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from seedbed.disk import write_atomically
from seedbed.errors import MissingExtra
from seedbed.runs.compare import compare, group_by_seed, plus_minus
from seedbed.runs.folder import read_summary
from seedbed.runs.info import RunInfo, is_run
from seedbed.runs.query import select
from seedbed.runs.report import write_report
from seedbed.runs.table import load_runs, render, table
from seedbed.sweep.plan import Plan
from seedbed.sweep.standing import has_ended


@dataclass(frozen=True)
class Ended:
    """How one run of a sweep ended."""

    name: str
    status: str
    """As `metrics.json` has it; `not_begun` where the run never came to its first step."""
    val_loss: float | None
    """The best, in nats per token."""
    reason: str
    run: Path
    log: Path

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def how_it_ended(name: str, folder: Path) -> Ended:
    run, log = folder / name, log_of(folder, name)
    summary = read_summary(run)
    status = str(summary.get("status", "not_begun"))
    return Ended(name, status, summary.get("best_val_loss"), summary.get("reason") or "", run, log)


def log_of(folder: Path, name: str) -> Path:
    """Where the output of a run goes."""
    return folder / "logs" / f"{name}.txt"


def show_results(plan: Plan, folder: Path, failed: Mapping[str, int], console: Console) -> None:
    """Write table.md, table.csv and report.html, and print the table, the seeds' spread, and what failed."""

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    runs = select(load_runs([folder / name for name in plan.runs if is_run(folder / name)]), sort="val_loss")
    say()
    if runs:
        rows = table(runs)
        whole = [run for run in runs if has_ended(run.path, plan.runs[run.name]) and run.name not in failed]
        meaning = what_it_means([run for run in whole if run.summary["status"] != "diverged"])
        write_atomically(folder / "table.csv", render(rows, ["all"], "csv") + "\n")
        write_atomically(folder / "table.md", "\n".join([render(rows, form="markdown"), "", *meaning]) + "\n")
        say(render(rows, width=console.width if console.is_terminal else None))
        for line in meaning:
            say(line)
        say()
        say(f"The table: {folder}/table.md, {folder}/table.csv")
        try:
            page = write_report([run.path for run in runs], folder / "report.html")
            say(f"The runs compared, with their curves: {page}")
        except MissingExtra as error:
            say(f"Warning: no report.html: {error}")
    for name, code in failed.items():
        say(f"Warning: {name} failed with exit code {code}: {last_words(log_of(folder, name))}")


def what_it_means(runs: Sequence[RunInfo]) -> list[str]:
    """The settings of runs that came to their ends, best first, and what of the difference is more than luck."""
    groups = sorted(group_by_seed(runs), key=lambda group: math.inf if group.val_loss is None else group.val_loss)
    if len(groups) < 2:
        return []
    best_first = compare([runs[place] for group in groups for place in group.members])
    if all(group.deviation is None for group in groups):
        return ["Differences may be luck: with `seeds: [0, 1, 2]` in the file, their spread tells."]
    means = [
        f"{group.name}: validation loss {plus_minus(group.val_loss, group.deviation, len(group.members))}"
        for group in best_first.groups
        if group.val_loss is not None
    ]
    return [f"- {line}" for line in (*means, *best_first.verdicts[: len(groups) - 1])]


def last_words(log: Path) -> str:
    """The error in the last lines of a run's log, and where the log is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = [line.removeprefix("error: ") for line in lines[-5:] if line.startswith("error: ")] or lines[-1:]
    return f"{' '.join(said)} (all it said: {log})"
