"""The figures of a run as columns, read fast: a million records of `metrics.jsonl` in under three seconds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from seedbed.runs.values import is_number

AXES = ("step", "epoch", "tokens", "elapsed_hours")
CHUNK = 1 << 16  # bytes parsed at once, so that the records are still in the processor's cache when they become columns

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One figure of a run where it was measured: N values, and where each stands in the run."""

    step: Floats
    """(N,) optimizer updates so far."""
    epoch: Floats
    tokens: Floats
    """(N,) targets learnt so far."""
    elapsed_hours: Floats
    values: Floats
    """(N,) in the figure's own unit, all finite."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, which: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Series:
        """The part that a mask, an index array or a slice picks: `series[series.step > 100]`."""
        return Series(*(getattr(self, field.name)[which] for field in fields(self)))


_EMPTY: Floats = np.empty(0)
NOTHING = Series(_EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY)


def read_series(run: Path) -> dict[str, Series]:
    """Every figure in the run's `metrics.jsonl` by name, such as `train_loss`, `val_loss`, `lr`, `val_loss/DOMAIN`.

    A half-written last line, lines that are no record, and values that are no finite number are passed over. A step
    that was recorded twice (the run went on from before it) counts as it was recorded last.
    """
    tables: dict[tuple[str, ...], list[Floats]] = {}
    for record_names, table in _tables(run / "metrics.jsonl"):
        tables.setdefault(record_names, []).append(table)
    parts: dict[str, list[Series]] = {}
    for names, found in tables.items():
        columns = dict(zip(names, np.concatenate(found).T, strict=True))  # each (records,)
        nothing = np.zeros(len(columns["step"]))
        step, epoch, tokens, hours = (columns.pop(axis, nothing) for axis in AXES)
        for name, values in columns.items():
            parts.setdefault(name, []).append(_in_order(Series(step, epoch, tokens, hours, values)))
    return {name: found[0] if len(found) == 1 else _in_order(_joined(found)) for name, found in sorted(parts.items())}


def _joined(parts: list[Series]) -> Series:
    return Series(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Series)))


def _in_order(series: Series) -> Series:
    """Finite values alone, by rising steps; of several records of one step the last."""
    finite = np.isfinite(series.values)
    if not finite.all():
        series = series[finite]
    if np.any(np.diff(series.step) <= 0):
        _, from_the_end = np.unique(series.step[::-1], return_index=True)
        series = series[len(series) - 1 - from_the_end]
    return series


def _tables(path: Path) -> Iterator[tuple[tuple[str, ...], Floats]]:
    """Names of fields and a table (records, fields) for all records of a chunk that have just these fields."""
    for chunk in _chunks(path):
        rows: dict[tuple[str, ...], list[object]] = {}
        for record in _records(chunk):
            rows.setdefault(tuple(record), []).extend(record.values())
        for names, values in rows.items():
            if "step" in names:
                yield names, _numbers(values).reshape(-1, len(names))


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's whole lines, a block at a time; what was cut off while it was written is left out."""
    rest = b""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as stream:
        while block := stream.read(CHUNK):
            lines, newline, tail = (rest + block).rpartition(b"\n")
            rest = tail if newline else rest + block
            if lines:
                yield lines


def _records(lines: bytes) -> Iterable[dict[str, object]]:
    try:
        found = from_json(b"[" + lines.replace(b"\n", b",") + b"]")
    except ValueError:
        found = [_record(line) for line in lines.splitlines()]
    return (record for record in found if isinstance(record, dict))


def _record(line: bytes) -> object:
    try:
        return from_json(line)
    except ValueError:
        return None


def _numbers(values: list[object]) -> Floats:
    """As floats; what is no number becomes NaN."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([value if is_number(value) else math.nan for value in values], dtype=np.float64)
