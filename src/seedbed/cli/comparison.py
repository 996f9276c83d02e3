"""The printing of several runs side by side: `seedbed runs compare RUN RUN`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from textwrap import wrap

from seedbed.cli.console import wrapped
from seedbed.runs.columns import COLUMNS, cell, score
from seedbed.runs.compare import UNITS, Answers, Comparison, Group, Measure, plus_minus
from seedbed.runs.curves import WINDOW, Axis, Curve
from seedbed.runs.folder import FINISHED
from seedbed.runs.grid import GAP, cut, cut_apart, markdown_grid, printable, text_grid
from seedbed.runs.values import duration, is_number, plain

LONGEST_CELL = 28
MOST_VERDICTS = 10
MOST_ANSWERS = 5
LONGEST_ANSWER = 400

LOSSES = ("train_loss", "val_loss", "perplexity")
POINTS: dict[Axis, Callable[[float], str]] = {
    "step": lambda step: f"{step:,.0f}",
    "tokens": lambda tokens: f"{tokens:,.0f}",
    "time": duration,
    "epoch": lambda epoch: f"{epoch:.2f}",
}
TITLES = {"val_loss": "Validation loss", "train_loss": f"Training loss, mean of {WINDOW} steps,"}

Grid = tuple[Sequence[str], Sequence[Sequence[str]], Sequence[int | None]]
"""Headings, rows, and of each column how narrow it may become, as `text_grid` takes them."""


def text_lines(comparison: Comparison, width: int) -> Iterator[str]:
    """The comparison for a terminal, or whatever is `width` characters wide."""
    for title, grid in _grids(comparison):
        yield from (title, *_blocks(grid, width), "")
    for sentence in _verdicts(comparison):
        yield from wrapped(sentence, width)
    for answers in comparison.answers[:MOST_ANSWERS]:
        yield from ("", *wrap(f"> {_prompt(answers)}", width, subsequent_indent="  "))
        answered = list(_answered(comparison.names, answers))
        label = max(len(name) for name, _ in answered)
        for name, text in answered:
            first = f"  {name:<{label}}  "
            yield from wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first)) or [first.rstrip()]
    yield from _left_out(comparison)


def markdown_lines(comparison: Comparison) -> Iterator[str]:
    """The comparison as Markdown."""
    for title, grid in _grids(comparison):
        yield from (title, "", *markdown_grid(*grid), "")
    yield from (f"- {sentence}" for sentence in comparison.verdicts)
    for answers in comparison.answers:
        yield from ("", f"**{_prompt(answers)}**", "")
        for name, text in _answered(comparison.names, answers):
            yield f"- {name}: {text}"


def _grids(comparison: Comparison) -> Iterator[tuple[str, Grid]]:
    options = {name: [plain(value) for value in values] for name, values in comparison.options.items()}
    figures = {COLUMNS[name].heading: _cells(comparison, name) for name in comparison.figures}
    for title, heading, values in (
        ("Options that differ:", "option", options),
        ("What became of them (* is the best):", "figure", figures),
    ):
        if values:
            yield title, _side_by_side(heading, comparison.names, values)
    if any(len(group.members) > 1 for group in comparison.groups):
        yield "Runs that differ only in the seed, mean ± standard deviation (seeds):", _groups(comparison.groups)
    caveat = "" if comparison.measure == "val_loss" else "; they do not compare, because text or tokens differ"
    for curve in comparison.curves:
        yield f"{TITLES[curve.name]} in nats per token by {comparison.axis}{caveat}:", _curve(comparison, curve)


def _side_by_side(heading: str, names: Sequence[str], values: Mapping[str, Sequence[str]]) -> Grid:
    """A row a thing, a column a run."""
    rows = [[name, *cut_apart([printable(text) for text in texts], LONGEST_CELL)] for name, texts in values.items()]
    return [heading, *names], rows, [0, *(None for _ in names)]


def _blocks(grid: Grid, width: int) -> Iterator[str]:
    """The grid; columns that do not fit follow in a further block, below the first column again."""
    headings, rows, least = grid
    label, *widths = (max(len(row[place]) for row in (headings, *rows)) for place in range(len(headings)))
    start = 1
    while start < len(headings):
        end, used = start + 1, label + len(GAP) + widths[start - 1]
        while end < len(headings) and used + len(GAP) + widths[end - 1] <= width:
            used += len(GAP) + widths[end - 1]
            end += 1
        block = [[row[0], *row[start:end]] for row in (headings, *rows)]
        yield from text_grid(block[0], block[1:], [least[0], *least[start:end]])
        start = end
        if start < len(headings):
            yield ""


def _cells(comparison: Comparison, name: str) -> list[str]:
    """A figure of each run; of those that were finished, the best marked where they compare and one looks best."""
    values, column = comparison.figures[name], COLUMNS[name]
    statuses = comparison.figures.get("status", FINISHED[:1] * len(values))
    texts = [cell(value, column) or "-" for value in values]
    finished = [place for place, how in enumerate(statuses) if how in FINISHED and is_number(score(values[place]))]
    if len(finished) < 2 or column.better is None or not _compares(name, comparison.measure):
        return texts
    best = (min if column.better == "lower" else max)(finished, key=lambda place: score(values[place]))
    if [texts[place] for place in finished].count(texts[best]) == 1:
        texts[best] += " *"
    return texts


def _compares(name: str, measure: Measure | None) -> bool:
    """Whether runs with this common measure of held-out text compare in a figure."""
    return measure == "val_loss" or (name not in LOSSES and (name != "bits_per_byte" or measure is not None))


def _groups(groups: Sequence[Group]) -> Grid:
    rows = [
        (
            group.name,
            _mean(group.val_loss, group.deviation, group),
            _mean(group.bits_per_byte, group.bits_deviation, group),
        )
        for group in groups
    ]
    return ("runs", UNITS["val_loss"], UNITS["bits_per_byte"]), rows, (0, None, None)


def _mean(mean: float | None, deviation: float | None, group: Group) -> str:
    return "-" if mean is None else plus_minus(mean, deviation, len(group.seeds))


def _curve(comparison: Comparison, curve: Curve) -> Grid:
    """A row a run, a column a point."""
    form = POINTS[comparison.axis]
    nothing = ["-"] * len(curve.points)
    rows = [
        [name, *([f"{value:.4f}" for value in values] or nothing)]
        for name, values in zip(comparison.names, curve.values, strict=True)
    ]
    return ["run", *map(form, curve.points)], rows, [0, *(None for _ in curve.points)]


def _verdicts(comparison: Comparison) -> list[str]:
    """All sentences; of many, those about the group that predicts best."""
    if len(comparison.verdicts) <= MOST_VERDICTS:
        return list(comparison.verdicts)
    measured = [group for group in comparison.groups if group.val_loss is not None]
    if not measured:
        return []
    best = min(measured, key=lambda group: group.val_loss or 0.0)
    pairs = zip(comparison.verdicts, combinations(comparison.groups, 2), strict=True)
    return [sentence for sentence, pair in pairs if best in pair]


def _prompt(answers: Answers) -> str:
    return printable(answers.prompt) or "(no prompt)"


def _answered(names: Sequence[str], answers: Answers) -> Iterator[tuple[str, str]]:
    for name, text in (("reference", answers.reference), *zip(names, answers.texts, strict=True)):
        if text is not None:
            yield name, cut(printable(text), LONGEST_ANSWER)


def _left_out(comparison: Comparison) -> Iterator[str]:
    verdicts = len(comparison.verdicts) - len(_verdicts(comparison))
    answers = len(comparison.answers) - MOST_ANSWERS
    left = [f"{verdicts} comparisons of pairs"] if verdicts else []
    left += [f"{answers} prompts"] if answers > 0 else []
    if left:
        yield from ("", f"{' and '.join(left)} more: --markdown or --json has them all.")
