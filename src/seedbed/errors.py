"""Every error a user can meet, and the exit code it ends the program with.

    SeedbedError
    ├── ConfigError        2   a flag, a key or a combination of them
    │   └── MissingExtra   2   an optional library that is not installed
    ├── DataError          3   text, rows, tokens
    ├── CheckpointError    4   a checkpoint that is damaged, and none intact
    ├── RunInUseError      5   another process writes to the run folder
    ├── DivergedError      6   the numbers went bad and stayed bad
    ├── OutOfMemoryError   7   not even one sequence fits
    ├── StorageError       8   the disk is full or refuses to write
    ├── JudgeError         2   a judge that cannot be reached, refuses, or is not understood
    └── LostProcessError   1   another of the processes that train together failed; its exit code where it is known

A message names what, where, what was expected, and the remedy. Mistakes of ours are `assert`s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any


class SeedbedError(Exception):
    """A problem the user can act on; the message is shown as it is, without a traceback."""

    exit_code = 1
    told: bool | None = None
    """Whether another process that trains with this one shows it; None where each of them comes upon it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (type(self), str(self), vars(self))  # as it is, whatever its `__init__` makes of arguments


def restored(kind: type[SeedbedError], message: str, values: Mapping[str, Any]) -> SeedbedError:
    """An error that came from another process."""
    error = kind.__new__(kind, message)
    vars(error).update(values)
    return error


class ConfigError(SeedbedError):
    """One or more things wrong with the options, all reported together."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class MissingExtra(ConfigError):
    """A feature needs a library that is not installed.

    >>> str(MissingExtra("Parquet files", "parquet"))
    "Parquet files need the extra 'parquet': pip install 'seedbed[parquet]'"
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} need the extra '{extra}': pip install 'seedbed[{extra}]'")


class DataError(SeedbedError):
    """The text cannot be read, is not text, or is too little."""

    exit_code = 3


class TooLittleTextError(DataError):
    """There is text to read, and not enough of it to learn from."""


class CheckpointError(SeedbedError):
    """A checkpoint or model folder is damaged or incomplete, and there is no intact one."""

    exit_code = 4


class RunInUseError(SeedbedError):
    """Another process is writing to this run folder."""

    exit_code = 5


class DivergedError(SeedbedError):
    """Training produced non-finite numbers again and again."""

    exit_code = 6


class OutOfMemoryError(SeedbedError):
    """The device has no memory for even one sequence."""

    exit_code = 7


class StorageError(SeedbedError):
    """The disk is full, over quota, read-only or failing."""

    exit_code = 8


class JudgeError(SeedbedError):
    """The judge cannot be reached, refuses, or gave no reply that could be used; what it did reply is kept."""

    exit_code = 2


class LostProcessError(SeedbedError):
    """Another of the processes that train together failed, died or no longer answers."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The hint to append to "unknown NAME": the nearest known name, or nothing.

    >>> did_you_mean("lerning_rate", ["learning_rate", "seed"])
    '; did you mean learning_rate?'
    """
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
