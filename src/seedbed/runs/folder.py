"""The run folder: what training writes and everything after it reads. Needs no torch.

config.yaml     every option with its source        events.jsonl   skipped steps, resumes, ...
metrics.jsonl   one record a step or validation     samples.jsonl  what the model wrote
metrics.json    the summary                         checkpoints/   best, final, step-N, ...
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from seedbed.disk import write_atomically
from seedbed.errors import ConfigError, RunInUseError, StorageError
from seedbed.parsing import parse_json

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

FINISHED = ("done", "early_stopped")
RECORD_FILES = ("metrics.jsonl", "samples.jsonl", "events.jsonl")


@contextlib.contextmanager
def being_made(what: str, folder: Path) -> Iterator[None]:
    """Around what makes `folder`, which the user named.

    Raises:
        StorageError: it cannot be made or written.
        OSError: no folder can have its name.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise
        raise StorageError(f"{folder}: {what} cannot be made ({error.strerror}); choose another --output") from None


class RunFolder:
    """One run's folder, open for writing by this process alone.

    Raises:
        RunInUseError: another process writes to it.
        StorageError: it cannot be made or written.
        OSError: no folder can have its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = {entry.name for entry in path.iterdir()} if path.is_dir() else None
        self.checkpoints = path / "checkpoints"
        with being_made("the run folder", path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise RunInUseError(
                    f"{path}: another process is training in this run folder; wait for it, or choose another --output"
                ) from None
        self._records: dict[str, _Records] = {}
        self._summary_refused: OSError | None = None

    def close(self) -> None:
        for records in self._records.values():
            records.close()
        self._records.clear()
        self._lock.close()

    def discard_if_empty(self) -> None:
        """Undo the making of the folder when no run was begun in it; what was there before stays."""
        if (self.path / "config.yaml").exists():
            return
        if self._found is None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for entry in self.path.iterdir():
            if entry.name not in self._found:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, `samples.jsonl` or `events.jsonl`.

        What the disk refuses is kept in memory and tried again with the next line; see `unwritten`.
        """
        if name not in self._records:
            self._records[name] = _Records(self.path / name)
        self._records[name].add(json.dumps(record, allow_nan=False))

    def event(self, kind: str, step: int, **details: Any) -> None:
        self.append("events.jsonl", {"event": kind, "step": step, **details})

    @property
    def unwritten(self) -> OSError | None:
        """Why records wait in memory, or the summary is an older one; None when all is in its files."""
        return next((records.refused for records in self._records.values() if records.refused), self._summary_refused)

    def positions(self) -> dict[str, int]:
        """Length in bytes of the records so far, safely on disk: what a checkpoint remembers.

        Raises:
            OSError: the disk refuses some of them.
        """
        lengths = {}
        for name in ("metrics.jsonl", "samples.jsonl"):
            if name in self._records:
                self._records[name].sync()
            path = self.path / name
            lengths[name] = path.stat().st_size if path.exists() else 0
        return lengths

    def truncate(self, positions: Mapping[str, int]) -> None:
        """Forget records written after a checkpoint was made; they will be written again."""
        for name, length in positions.items():
            if records := self._records.pop(name, None):
                records.close()
            path = self.path / name
            if path.exists() and path.stat().st_size > length:
                os.truncate(path, length)

    def write_config(self, text: str) -> None:
        write_atomically(self.path / "config.yaml", text)
        (self.path / "events.jsonl").touch()  # though nothing may happen

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `metrics.json`; see `unwritten`."""
        self._summary_refused = None
        try:
            write_atomically(self.path / "metrics.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            self._summary_refused = error


def is_being_written(run: Path) -> bool:
    """Whether a process holds the run's lock; a system without such locks cannot tell: yes."""
    taken = True
    if fcntl is not None:
        with contextlib.suppress(OSError):
            taken = (run / ".lock").exists()
            with (run / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                taken = False
    return taken


class ReadOnlyRunFolder(RunFolder):
    """A run's folder for a process beside the one that writes it: what is said to it goes nowhere."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"

    def close(self) -> None:
        pass

    def discard_if_empty(self) -> None:
        pass

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        pass

    @property
    def unwritten(self) -> OSError | None:
        return None

    def positions(self) -> dict[str, int]:
        return {}

    def truncate(self, positions: Mapping[str, int]) -> None:
        pass

    def write_config(self, text: str) -> None:
        pass

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        pass


class _Records:
    """A file of lines that grows; a line that the disk takes only half of is finished before the next."""

    def __init__(self, path: Path) -> None:
        self.refused: OSError | None = None
        self._path = path
        self._file: FileIO | None = None
        self._waiting = bytearray()

    def add(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def sync(self) -> None:
        """All of it on disk.

        Raises:
            OSError: the disk refuses.
        """
        self._write()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        try:
            if self._file is None:
                _cut_half_line(self._path)
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                written = self._file.write(self._waiting)
                del self._waiting[:written]
        except OSError as error:
            self.refused = error
            raise
        self.refused = None


def _cut_half_line(path: Path) -> None:
    """Drop what a killed process wrote after the last whole line."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            stream.seek(start)
            if (newline := stream.read(end - start).rfind(b"\n")) >= 0:
                stream.truncate(start + newline + 1)
                return
            end = start
        stream.truncate(0)


def has_damaged_summary(path: Path) -> bool:
    """Whether the run at `path` has a summary that cannot be read."""
    return (path / "metrics.json").exists() and not read_summary(path)


def require_whole_summary(path: Path) -> None:
    """Raise ConfigError when the run at `path` has a summary that cannot be read, so that nothing replaces it."""
    if has_damaged_summary(path):
        raise ConfigError(f"{path}/metrics.json is not readable, and this would replace it; mend or remove it")


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of the run at `path`, empty when it has none, or one that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        summary = parse_json((path / "metrics.json").read_text(encoding="utf-8"))
        if isinstance(summary, dict):
            return summary
    return {}


def update_summary(path: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of the summary of the run at `path`, which nobody else may be writing; returns the whole of it.

    Raises:
        ConfigError: there is one that cannot be read.
        RunInUseError: the run is being trained.
        StorageError: it cannot be written.
    """
    require_whole_summary(path)
    run = RunFolder(path)
    try:
        summary = {**read_summary(path), **changes}
        run.write_summary(summary)
        if refused := run.unwritten:
            raise StorageError(f"{path}/metrics.json cannot be written ({refused.strerror})")
    finally:
        run.close()
    return summary


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `.jsonl` file; a half-written last line, and lines that are no record, are passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                record = parse_json(line) if line.endswith("\n") else None
                if isinstance(record, dict):
                    yield record
