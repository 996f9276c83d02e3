"""Which options of a run somebody chose, and which differ from its parent's."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from seedbed.config import Origin, origin_of
from seedbed.errors import ConfigError
from seedbed.runs.info import RunInfo, is_run, read_run, run_of

BOOKKEEPING = frozenset(
    {
        *("output", "resume", "resume_from", "log_every", "save_every", "keep_checkpoints", "async_save"),
        *("tensorboard", "report", "strict", "allow", "stop_at_step"),
    }
)
"""Options that change no figure of a run, only what is written and where."""


def parent_run(run: RunInfo) -> RunInfo | None:
    """The run that this one began from, if it was a run and still exists."""
    return find_run(run, run.parent)


def find_run(run: RunInfo, name: object) -> RunInfo | None:
    """The run at a path that `run` remembers, or beside it where both were moved; None where there is none."""
    if not isinstance(name, str) or not name:
        return None
    places = [_began_in(run) / name]
    if not _may_be_on_the_hub(name, run):
        places += [Path(name), run.path.resolve().parent / Path(name).name]
    for path in places:
        with contextlib.suppress(OSError, ValueError):  # no file can have that name
            folder = run_of(path)
            if is_run(folder):
                same = folder.resolve() == run.path.resolve()
                return None if same else _read_unchanged(folder, (folder / "config.yaml").stat().st_mtime_ns)
    return None


def _may_be_on_the_hub(name: str, run: RunInfo) -> bool:
    """Whether a name may be `gpt2` or `owner/name`: no path is as short, unless it stood beside the run's own."""
    path = Path(name)
    return not path.is_absolute() and len(path.parts) <= 2 and path.parent != _output(run).parent


def _began_in(run: RunInfo) -> Path:
    """The folder that the run's relative paths start from, as `--output` tells."""
    parts, path = _output(run).parts, run.path.resolve()
    return Path(*path.parts[: -len(parts)]) if path.parts[-len(parts) :] == parts else Path()


def _output(run: RunInfo) -> Path:
    """Where the run was written, as `--output` has it or would have it."""
    output = run.options.get("output")
    return Path(output) if isinstance(output, str) else Path("runs", run.name)


@lru_cache(maxsize=64)
def _read_unchanged(folder: Path, _modified: int) -> RunInfo | None:
    """Many runs have the same parent; it is read once, and again when its options change."""
    try:
        return read_run(folder)
    except ConfigError:
        return None


def changed_options(run: RunInfo) -> dict[str, tuple[Any, Any]]:
    """The options that differ from the parent run's: old value and new.

    Where the parent was trained in another regime, most values differ because the regime's defaults do: then only
    those that somebody chose for this run.
    """
    parent = parent_run(run)
    if parent is None:
        return {}
    alike = parent.regime == run.regime
    return {
        name: (parent.options.get(name), value)
        for name, value in run.options.items()
        if name not in BOOKKEEPING
        and parent.options.get(name) != value
        and (alike or is_chosen(run, name))
        and not (name == "model" and value == run.parent)
    }


def is_chosen(run: RunInfo, name: str) -> bool:
    """Whether an option of the run is not as it is by default in its regime."""
    return origin_of(run.source(name)) is not Origin.DEFAULT


def chosen_options(run: RunInfo) -> dict[str, tuple[Any, str]]:
    """The options that are not as they are by default: value and source."""
    return {name: (value, run.source(name)) for name, value in run.options.items() if is_chosen(run, name)}
