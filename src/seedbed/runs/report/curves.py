"""The curves of runs as plotly figures: plain dictionaries, thinned for a page, on every axis a reader may choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seedbed.runs.report.marks import Mark
from seedbed.runs.series import NOTHING, Floats, Series

Figure = dict[str, Any]
Trace = dict[str, Any]
AllSeries = Mapping[str, Series]

POINTS = 2000  # of one curve on a page of one run; several runs share them
FEWEST_POINTS = 300
SMOOTHED_SHARE = 0.08  # of a curve: what one smoothed value is the mean of
MOST_SMOOTHED = 2000  # steps

TIME_UNITS = (("seconds", 3600.0, 0.05), ("minutes", 60.0, 2.0), ("hours", 1.0, float("inf")))
"""Name, how many in an hour, and up to how many hours it is used."""

# Each has a contrast of at least 3 to white and to the dark page.
BLUE, ORANGE, GREEN, SLATE = "#3b7ddd", "#d9730d", "#22935b", "#7b8494"
COLOURS = (BLUE, ORANGE, GREEN, "#a76bcf", "#d5517b", "#0f9aa6", "#9a8418", "#8d6e63", "#6a7fdb", "#5f9e2f")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Line:
    """What is one line in every chart of a comparison: a run, or the runs of one setting under several seeds."""

    name: str
    runs: Sequence[AllSeries]


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    title: str
    unit: str
    names: tuple[str, ...]
    """The series it shows, of those that a run has."""
    log: bool = False
    noisy: bool = False
    """Whether a smoothed line goes over the values, or in their place where there are many lines."""
    faint: bool = True
    """Whether the values themselves stand behind the smoothed line."""
    ticks: Mapping[str, str] = field(default_factory=dict)
    """How plotly writes the numbers of the vertical axis."""
    convert: Callable[[Floats], Floats] | None = None
    """From the unit of `metrics.jsonl` to that of the chart."""


def _perplexity(loss: Floats) -> Floats:
    return np.exp(np.minimum(loss, 100.0))


def _per_cent(share: Floats) -> Floats:
    return 100 * share


SPEED_AND_REST = (
    Chart("Learning rate", "", ("lr",), ticks={"exponentformat": "e"}),
    Chart("Gradient norm", "before clipping, log", ("grad_norm",), log=True, noisy=True),
    Chart("Speed", "tokens per second", ("tokens_per_second",), noisy=True),
    Chart("Memory", "MB, the most so far", ("memory_mb",)),
    Chart("Making batches", "% of the step's time", ("data_share",), noisy=True, convert=_per_cent),
)
CHARTS_OF_RUN = (
    Chart("Loss", "nats per token", ("train_loss", "val_loss"), noisy=True),
    Chart("Perplexity", "log", ("train_loss", "val_loss"), log=True, noisy=True, faint=False, convert=_perplexity),
    *SPEED_AND_REST,
)
CHARTS_OF_RUNS = (
    Chart("Validation loss", "nats per token", ("val_loss",)),
    Chart("Training loss", "nats per token, smoothed", ("train_loss",), noisy=True),
    Chart("Validation perplexity", "log", ("val_loss",), log=True, convert=_perplexity),
    *SPEED_AND_REST,
)


def figures_of_run(series: AllSeries, marks: Iterable[Mark], clipped_above: float | None) -> list[Figure]:
    """The figures of one run, events marked on the first; one without a single value is left out."""
    axes = _Axes([series])
    figures = []
    for chart in CHARTS_OF_RUN:
        traces = [trace for name in _present(chart, series) for trace in _traces_of_run(chart, name, series, axes)]
        if traces and chart.title == "Loss":
            traces += _mark_traces(marks, series, axes)
        if traces:
            limit = clipped_above if "grad_norm" in chart.names else None
            figures.append(_figure(chart, traces, axes, limit))
    return figures


def figures_of_runs(lines: Sequence[Line]) -> list[Figure]:
    """The figures of several runs, one line each; runs of a group are their mean in a band of one deviation."""
    axes = _Axes([series for line in lines for series in line.runs])
    points = max(FEWEST_POINTS, POINTS // max(1, len(lines)))
    figures = []
    for chart in CHARTS_OF_RUNS:
        traces = [trace for line, style in styles(lines) for trace in _traces_of_line(chart, line, style, axes, points)]
        if traces:
            figures.append(_figure(chart, traces, axes))
    return figures


def styles(lines: Sequence[Line]) -> Iterator[tuple[Line, dict[str, str]]]:
    """Each line with its colour and dash, all different for up to forty lines."""
    for place, line in enumerate(lines):
        dash = DASHES[place // len(COLOURS) % len(DASHES)]
        yield line, {"color": COLOURS[place % len(COLOURS)], "dash": dash}


def thin(values: Floats, points: int) -> NDArray[np.intp]:
    """Rising indices of at most about `points` of N values, the least and the greatest of each stretch among them."""
    if len(values) <= points:
        return np.arange(len(values))
    size = -(-len(values) // (points // 2))
    padded = np.pad(values, (0, -len(values) % size), mode="edge").reshape(-1, size)  # (stretches, size)
    starts = np.arange(0, len(values), size)
    kept = np.concatenate([starts + padded.argmin(axis=1), starts + padded.argmax(axis=1), [0, len(values) - 1]])
    return np.unique(np.minimum(kept, len(values) - 1))


def smooth(values: Floats) -> Floats:
    """Means of as many values before each as after it (fewer at the end), over a fixed share of the curve."""
    count = len(values)
    half = min(round(count * SMOOTHED_SHARE / 2), MOST_SMOOTHED // 2)
    places = np.arange(count)
    reach = np.minimum(places, half)  # the steep beginning is not flattened
    first, end = places - reach, np.minimum(places + reach + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[end] - sums[first]) / (end - first))


def mean_and_deviation(runs: Sequence[Series]) -> tuple[Series, Floats]:
    """The mean of S runs at the steps of the first that all of them reached, and the deviation of the S there.

    Runs that have no step in common have no mean: then it is the first of them, without deviation.
    """
    reached = min(series.step[-1] for series in runs)
    begun = max(series.step[0] for series in runs)
    first = runs[0][(runs[0].step >= begun) & (runs[0].step <= reached)]
    if len(runs) == 1 or not len(first):
        return runs[0], np.zeros(len(runs[0]))

    def at_steps(column: str) -> Floats:
        return np.stack([np.interp(first.step, series.step, getattr(series, column)) for series in runs])  # (S, N)

    values = at_steps("values")
    columns = {column: at_steps(column).mean(axis=0) for column in ("epoch", "tokens", "elapsed_hours")}
    return replace(first, values=values.mean(axis=0), **columns), values.std(axis=0, ddof=1)


class _Axes:
    """What may stand on the horizontal axis, with one unit of time for all runs of the page."""

    def __init__(self, runs: Iterable[AllSeries]) -> None:
        ends = [series.elapsed_hours[-1] for run in runs for series in run.values() if len(series)]
        longest = max(ends, default=0.0)
        self.time_unit, self.per_hour, _ = next(unit for unit in TIME_UNITS if longest <= unit[2])

    def of(self, series: Series) -> dict[str, list[float]]:
        return {
            "tokens": _short(series.tokens, digits=9),
            "time": _short(series.elapsed_hours * self.per_hour),
            "epoch": _short(series.epoch),
        }

    @property
    def titles(self) -> dict[str, str]:
        return {"step": "step", "tokens": "tokens", "time": self.time_unit, "epoch": "epoch"}


def _present(chart: Chart, series: AllSeries) -> Iterator[str]:
    """Names of the chart's series that the run has, and of the validation of earlier domains after them."""
    for name in chart.names:
        if len(series.get(name, NOTHING)):
            yield name
    if "val_loss" in chart.names:
        yield from (name for name, found in series.items() if name.startswith("val_loss/") and len(found))


def _traces_of_run(chart: Chart, name: str, series: AllSeries, axes: _Axes) -> Iterator[Trace]:
    found = series[name]
    if name.startswith("val_loss"):
        domains = [other for other in series if other.startswith("val_loss/")]
        colour = COLOURS[2 + domains.index(name) % (len(COLOURS) - 2)] if name in domains else ORANGE
        label = f"validation on {name.partition('/')[2]}" if name in domains else "validation"
        look: dict[str, Any] = {"mode": "lines+markers", "line": {"color": colour, "width": 2}, "marker": {"size": 6}}
        yield _trace(chart, found[thin(found.values, POINTS)], label, axes, **look)
        return
    colour, label = (BLUE, "training") if name == "train_loss" else (SLATE, "")
    if chart.noisy and len(found) > 20:
        if chart.faint:
            thinned, line = found[thin(found.values, POINTS)], {"color": colour, "width": 1}
            yield _trace(chart, thinned, label, axes, "each step", line=line, opacity=0.35)
        found = replace(found, values=smooth(found.values))
    shape = _trace(chart, found[thin(found.values, POINTS // 4)], label, axes, line={"color": colour, "width": 2})
    yield {**shape, "mode": "lines+markers"} if len(found) < 3 else shape


def _traces_of_line(chart: Chart, line: Line, style: Mapping[str, str], axes: _Axes, points: int) -> Iterator[Trace]:
    """One curve, in a band where it is the mean of several seeds."""
    runs = [run[name] for run in line.runs for name in chart.names if len(run.get(name, NOTHING))]
    if not runs:
        return
    if chart.noisy:
        runs = [replace(series, values=smooth(series.values)) for series in runs]
    mean, deviation = mean_and_deviation(runs)
    kept = thin(mean.values, points)
    mean, deviation = mean[kept], deviation[kept]
    if deviation.any():
        edge: dict[str, Any] = {"line": {"width": 0}, "hoverinfo": "skip", "hovertemplate": None}
        fill = {"fill": "tonexty", "fillcolor": f"{style['color']}2e"}
        yield _trace(chart, replace(mean, values=mean.values + deviation), line.name, axes, **edge)
        yield _trace(chart, replace(mean, values=mean.values - deviation), line.name, axes, **edge, **fill)
    pointed: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 5}} if chart.names == ("val_loss",) else {}
    yield _trace(chart, mean, line.name, axes, line={**style, "width": 1.8}, **pointed)


def _trace(chart: Chart, series: Series, name: str, axes: _Axes, part: str = "", **look: Any) -> Trace:
    """A curve; `meta` holds the values of its other axes, and `name` its entry in the legend."""
    values = chart.convert(series.values) if chart.convert else series.values
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(f"{name}, {part}" if part and name else part or name or chart.title.lower()),
        "legendgroup": name,
        "x": _short(series.step, digits=12),
        "y": _short(values),
        "hovertemplate": "%{y:.5~g}",
        "meta": axes.of(series),
        **look,
    }


def _mark_traces(marks: Iterable[Mark], series: AllSeries, axes: _Axes) -> Iterator[Trace]:
    """Marks of one kind are one trace, at the heights of the loss."""
    by_kind: dict[str, list[Mark]] = {}
    for mark in marks:
        by_kind.setdefault(mark.kind.name, []).append(mark)
    train, validation = series.get("train_loss", NOTHING), series.get("val_loss", NOTHING)
    for name, found in by_kind.items():
        kind = found[0].kind
        curve = validation if len(validation) and (kind.on_validation or not len(train)) else train
        if not len(curve):
            continue
        steps = np.array([mark.step for mark in found], dtype=np.float64)

        def at_steps(column: str, curve: Series = curve, steps: Floats = steps) -> Floats:
            return np.asarray(np.interp(steps, curve.step, getattr(curve, column)))

        places = Series(steps, *(at_steps(column) for column in ("epoch", "tokens", "elapsed_hours", "values")))
        trace = _trace(CHARTS_OF_RUN[0], places, name, axes)
        yield {
            **trace,
            "mode": "markers",
            "marker": {"color": kind.colour, "symbol": kind.symbol, "size": 11},
            "text": [escape(mark.text) for mark in found],
            "hovertemplate": "%{text}",
            "meta": {**trace["meta"], "mark": True},
        }


def _figure(chart: Chart, traces: list[Trace], axes: _Axes, limit: float | None = None) -> Figure:
    scale = _log_scale(traces) if chart.log else {"type": "linear"}
    line = {"color": ORANGE, "width": 1.5, "dash": "dash"}
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": line}
    unit = f"{chart.unit}; dashed: clipped above {limit:g}" if limit else chart.unit
    layout = {
        "title": {"text": chart.title, "subtitle": {"text": unit}},
        "yaxis": {**scale, **chart.ticks},
        "shapes": [across] if limit else [],
        "meta": {"axes": axes.titles},
    }
    return {"data": traces, "layout": layout}


def _log_scale(traces: Iterable[Trace]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 of each power of ten; at these powers alone where there are many."""
    values = [value for trace in traces for value in trace["y"] if value > 0]
    times = max(values) / min(values) if values else 1.0
    spacing = {"dtick": 1} if times > 1000 else {"dtick": "D2"} if times > 6 else {}
    return {"type": "log", "tickformat": ",.3~r", **spacing}


def _short(values: Floats, digits: int = 6) -> list[float]:
    """With the digits that a page can show; whole numbers as such."""
    rounded = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value.is_integer() else value for value in rounded]
