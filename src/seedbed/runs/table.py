"""The table of runs as text, Markdown or CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from seedbed.errors import ConfigError
from seedbed.runs.columns import COLUMNS, SHOWN_BY_DEFAULT, Column, cell, check_columns, score
from seedbed.runs.folder import read_summary
from seedbed.runs.grid import GAP, cut_apart, markdown_grid, text_grid
from seedbed.runs.info import RunInfo, find_runs, read_run

Form = Literal["table", "markdown", "csv"]
ROOM_BESIDE_NAMES = 26
"""Characters for the loss and the status of a run."""


def load_runs(folders: Sequence[Path]) -> list[RunInfo]:
    """Every run at or below the folders, once. One whose options cannot be read has the status `unreadable`."""
    found = {path.resolve(): path for folder in folders for path in find_runs(folder)}
    return [_read_or_mark(path) for path in found.values()]


def _read_or_mark(path: Path) -> RunInfo:
    try:
        return read_run(path)
    except ConfigError:
        return RunInfo(path, "", {}, {}, {**read_summary(path), "status": "unreadable"})


def table(runs: Sequence[RunInfo], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each run: raw values by column name, None where unknown; without `columns`, of all columns.

    Runs of one name are told apart by the folders above them.

    Raises:
        ConfigError: every name that no column has.
    """
    wanted = check_columns(columns if columns is not None else ["all"])
    rows = [{name: COLUMNS[name].get(run) for name in wanted} for run in runs]
    if "name" in wanted:
        for row, name in zip(rows, distinct_names(runs), strict=True):
            row["name"] = name
    return rows


def distinct_names(runs: Sequence[RunInfo]) -> list[str]:
    """A name for each run: its folder's, and of those above as many as tell the runs apart."""
    paths = [run.path.resolve().parts for run in runs]
    depth = [1] * len(paths)
    for deeper in range(2, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-count:]) for parts, count in zip(paths, depth, strict=True)]
        twice = [place for place, name in enumerate(names) if names.count(name) > 1]
        for place in twice:
            depth[place] = min(deeper, len(paths[place]))
    return ["/".join(parts[-count:]) for parts, count in zip(paths, depth, strict=True)]


def default_columns(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> list[str]:
    """The default columns in which some run has a value; of these as many as fit, the most telling first."""
    filled = [name for name in SHOWN_BY_DEFAULT if any(row.get(name) is not None for row in rows)]
    chosen: list[str] = []
    used = -len(GAP)
    for name in filled:
        needed = len(GAP) + _least_width(rows, COLUMNS[name], width)
        if width is None or used + needed <= width:
            chosen.append(name)
            used += needed
    return [name for name in COLUMNS if name in chosen]


def _least_width(rows: Sequence[Mapping[str, Any]], column: Column, width: int | None) -> int:
    cells = [cell(row.get(column.name), column) for row in rows]
    natural = max(len(column.heading), *map(len, cells))
    if column.least is None:
        return natural
    enough = min(natural, max(column.least, len(column.heading)))
    return enough if column.name != "name" or width is None else _telling_width(cells, enough, natural, width)


def _telling_width(names: Sequence[str], least: int, natural: int, width: int) -> int:
    """How much of the names tells the runs apart, as far as there is room for it beside the next two columns."""
    most = max(least, min(natural, width - ROOM_BESIDE_NAMES))
    return next((to for to in range(least, most) if len(set(cut_apart(names, to))) == len(set(names))), most)


def render(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    form: Form = "table",
    width: int | None = None,
) -> str:
    """Rows of `table` as aligned text (cut to `width` where that can be), Markdown, or CSV of the raw values.

    Raises:
        ConfigError: every name that no column has.
    """
    chosen = default_columns(rows, width) if columns is None else check_columns(columns)
    if form == "csv":
        return _csv(rows, chosen)
    shown = [COLUMNS[name] for name in chosen]
    cells = [[cell(row.get(column.name), column) for column in shown] for row in rows]
    headings = [column.heading for column in shown]
    least = [column.least and _least_width(rows, column, width) for column in shown]
    if form == "markdown":
        return "\n".join(markdown_grid(headings, cells, least))
    return "\n".join(text_grid(headings, cells, least, width))


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    import csv
    from io import StringIO

    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[score(row.get(name)) for name in columns] for row in rows])
    return text.getvalue().removesuffix("\n")
