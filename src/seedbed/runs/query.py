"""Which runs to show, and in which order: `--filter 'lr<1e-4'`, `--sort -val_loss`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from seedbed.errors import ConfigError, did_you_mean
from seedbed.runs.columns import COLUMNS, cell, score
from seedbed.runs.info import RunInfo
from seedbed.runs.values import is_number, plain

ORDER: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
CONDITION = re.compile(r"\s*(\w+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)([kMB]?)", re.IGNORECASE)
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
SWITCH = {"true": "on", "yes": "on", "false": "off", "no": "off", "": "none", "null": "none"}


@dataclass(frozen=True)
class Condition:
    """One `--filter`: a column or an option, an operator, a value."""

    name: str
    operator: str
    wanted: str

    def holds(self, run: RunInfo) -> bool:
        """Whether the run meets it; what is unknown is neither above nor below anything."""
        value = value_of(run, self.name)
        if self.operator == "~":
            return self.wanted.casefold() in _texts(value, self.name)[0].casefold()
        if compare := ORDER.get(self.operator):
            number = parse_number(self.wanted)
            assert number is not None, "was checked as the condition was read"
            return is_number(score(value)) and compare(score(value), number)
        return self._equals(value) == (self.operator == "=")

    def _equals(self, value: Any) -> bool:
        number = parse_number(self.wanted)
        if number is not None and is_number(score(value)) and math.isclose(score(value), number):
            return True
        wanted = self.wanted.casefold()
        return SWITCH.get(wanted, wanted) in [text.casefold() for text in _texts(value, self.name)]


def parse_number(text: str) -> float | None:
    """A number, with k, M or B for thousands, millions or billions; None where it is none.

    >>> parse_number("5e-5"), parse_number("135M"), parse_number("cosine")
    (5e-05, 135000000.0, None)
    """
    match = NUMBER.fullmatch(text)
    return float(match[1]) * UNITS[match[2].lower()] if match else None


def value_of(run: RunInfo, name: str) -> Any:
    """What a run has in the column of this name, else as the option of this name."""
    return COLUMNS[name].get(run) if name in COLUMNS else run.options.get(name)


def select(runs: Sequence[RunInfo], filters: Sequence[str] = (), sort: str | None = None) -> list[RunInfo]:
    """The runs that meet all filters, sorted by a column or option; `-NAME` sorts downwards, unknown values come last.

    Raises:
        ConfigError: every filter that cannot be read, and every name that no column and no option has.
    """
    known = [*COLUMNS, *sorted({name for run in runs for name in run.options} - COLUMNS.keys())]
    problems: list[str] = []
    conditions = [condition for text in filters if (condition := _parse(text, known, problems))]
    by = (sort or "").removeprefix("-")
    if sort and by not in known:
        problems.append(f"--sort {sort}: no column or option has this name{did_you_mean(by, known)}")
    if problems and runs:
        raise ConfigError(problems)
    kept = [run for run in runs if all(condition.holds(run) for condition in conditions)]
    return _sorted(kept, by, downwards=bool(sort) and sort != by) if sort else kept


def _parse(text: str, known: Sequence[str], problems: list[str]) -> Condition | None:
    match = CONDITION.fullmatch(text)
    if not match:
        problems.append(f"--filter {text!r}: expected NAME, one of = != < <= > >= ~, VALUE, such as 'lr<1e-4'")
        return None
    condition = Condition(*match.groups())
    if condition.name not in known:
        near = did_you_mean(condition.name, known)
        problems.append(f"--filter {text!r}: no column or option is called {condition.name}{near}")
    elif condition.operator in ORDER and parse_number(condition.wanted) is None:
        problems.append(f"--filter {text!r}: expected a number after {condition.operator}")
    return condition


def _sorted(runs: Sequence[RunInfo], by: str, *, downwards: bool) -> list[RunInfo]:
    values = [(score(value_of(run, by)), run) for run in runs]
    known = [(value, run) for value, run in values if value is not None]
    known.sort(key=lambda pair: _rank(pair[0]), reverse=downwards)
    return [run for _, run in known] + [run for value, run in values if value is None]


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then texts by letters."""
    return (False, value, "") if is_number(value) else (True, 0.0, plain(value).casefold())


def _texts(value: Any, name: str) -> list[str]:
    """A value as the files have it, and as the table shows it."""
    raw = plain(score(value))
    return [raw, cell(value, COLUMNS[name])] if name in COLUMNS else [raw]
