"""What a run folder says of its run: its options, its summary, its events."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedbed.config import BY_DEFAULT
from seedbed.errors import ConfigError
from seedbed.parsing import parse_yaml
from seedbed.runs.folder import has_damaged_summary, read_records, read_summary

UNREADABLE = {"status": "unreadable", "reason": "metrics.json is damaged"}
"""Stands for a summary that cannot be read."""


@dataclass(frozen=True)
class RunInfo:
    """A run as its folder tells it. Runs of other versions may lack options and entries: ask with `.get`."""

    path: Path
    regime: str
    options: Mapping[str, Any]
    """Every resolved option, flat."""
    sources: Mapping[str, str]
    """Where each option's value came from."""
    summary: Mapping[str, Any]
    """`metrics.json`; empty when the run never came to its first step, of status `unreadable` when it is damaged."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def parent(self) -> str | None:
        """The run whose options it began with, or the checkpoint or model whose weights it began with."""
        return self.summary.get("parent")

    def source(self, name: str) -> str:
        """Where an option's value came from, in words."""
        return str(self.sources.get(name, BY_DEFAULT))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, oldest first."""
        return [event for event in read_records(self.path / "events.jsonl") if event.get("event") == kind]


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def run_of(path: Path) -> Path:
    """The run folder around a checkpoint; `path` itself where there is none."""
    above = path.resolve().parent
    return above.parent if above.name == "checkpoints" and is_run(above.parent) else path


def was_taught_to_answer(model: Path) -> bool:
    """Whether a model is of a run that learnt conversations; its tokenizer then has the template it read them with."""
    run = run_of(model)
    text = read_summary(run).get("text") if is_run(run) else None
    return isinstance(text, Mapping) and bool(text.get("conversations"))


def read_run(path: str | Path) -> RunInfo:
    """The run in a folder, or around a checkpoint.

    Raises:
        ConfigError: no such folder, or it holds no run.
    """
    run = run_of(Path(path))
    if not run.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run such as runs/NAME (`seedbed runs list`)")
    try:
        content = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: holds no run (there is no config.yaml); `seedbed runs list` shows the runs"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run}/config.yaml is not readable: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{run}/config.yaml is not of a run; expected lines such as `learning_rate: 0.0003`")
    sources = content.pop("sources", None)
    return RunInfo(
        path=run,
        regime=str(content.pop("regime", "scratch")),
        options=content,
        sources=sources if isinstance(sources, dict) else {},
        summary=read_summary(run) or (UNREADABLE if has_damaged_summary(run) else {}),
    )


def find_runs(root: Path) -> Iterator[Path]:
    """The run folders at or below `root`, by name; runs are not looked for inside runs.

    What is no folder, or may not be looked into, is passed over.
    """
    try:
        if is_run(root):
            yield root
            return
        below = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in below:
        if not entry.name.startswith(".") and not entry.is_file(follow_symlinks=False):
            yield from find_runs(Path(entry.path))
