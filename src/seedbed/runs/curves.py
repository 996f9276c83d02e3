"""Curves of several runs at common points, so that they can stand in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from seedbed.runs.series import NOTHING, Floats, Series

Axis = Literal["step", "tokens", "time", "epoch"]
FIELDS: dict[Axis, str] = {"step": "step", "tokens": "tokens", "time": "elapsed_hours", "epoch": "epoch"}
MOST_POINTS = 6
WINDOW = 50
"""Steps over which a training loss is averaged, as for `train_loss` in the summary."""


@dataclass(frozen=True)
class Curve:
    """One figure of every run at common points of the axis."""

    name: str
    points: tuple[float, ...]
    """(P,) in the axis' unit: steps, tokens, hours or epochs."""
    values: tuple[tuple[float, ...], ...]
    """(runs, P) in the figure's unit; empty for a run that never measured it."""


def align(runs: Sequence[Mapping[str, Series]], axis: Axis) -> list[Curve]:
    """Validation loss (interpolated) and training loss (mean of the steps before) of the runs, in nats per token.

    Only at points that every run with such a figure has reached, at most `MOST_POINTS`; a figure without common points
    is left out.
    """
    validations = [series.get("val_loss", NOTHING) for series in runs]
    trainings = [series.get("train_loss", NOTHING) for series in runs]
    points = _common_points(
        [_places(series, axis) for series in (validations if any(map(len, validations)) else trainings)]
    )
    curves = []
    for name, all_series, reading in (("val_loss", validations, _interpolated), ("train_loss", trainings, _averaged)):
        reached = _reached(points, [_places(series, axis) for series in all_series if len(series)])
        if len(reached):
            values = [reading(_places(series, axis), series.values, reached) for series in all_series]
            curves.append(Curve(name, tuple(reached.tolist()), tuple(tuple(row.tolist()) for row in values)))
    return curves


def _places(series: Series, axis: Axis) -> Floats:
    places: Floats = getattr(series, FIELDS[axis])
    return places


def _common_points(places: Sequence[Floats]) -> Floats:
    """Where the run with the fewest measurements was measured; evenly spread where that is less than twice."""
    known = [each for each in places if len(each)]
    if not known:
        return np.empty(0)
    first, last = max(each[0] for each in known), min(each[-1] for each in known)
    fewest = min(known, key=len)
    inside = fewest[(fewest >= first) & (fewest <= last)]
    if len(inside) < 2:
        return np.unique(np.linspace(first, last, MOST_POINTS)) if first <= last else np.empty(0)
    spread = np.linspace(0, len(inside) - 1, MOST_POINTS).round().astype(int)
    return np.asarray(inside[np.unique(spread)])


def _reached(points: Floats, places: Sequence[Floats]) -> Floats:
    """The points at which every run has been."""
    if not places:
        return np.empty(0)
    first, last = max(each[0] for each in places), min(each[-1] for each in places)
    return np.asarray(points[(points >= first) & (points <= last)])


def _interpolated(places: Floats, values: Floats, points: Floats) -> Floats:
    return np.asarray(np.interp(points, places, values)) if len(values) else np.empty(0)


def _averaged(places: Floats, values: Floats, points: Floats) -> Floats:
    """At each point the mean of the last `WINDOW` values up to there."""
    if not len(values):
        return np.empty(0)
    ends = np.searchsorted(places, points, side="right")
    return np.array([values[max(0, end - WINDOW) : end].mean() for end in ends])
