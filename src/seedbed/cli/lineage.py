"""The printing of a model's history: `seedbed runs show RUN --lineage`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from seedbed.cli.console import WIDTH, print_json, print_lines, wrapped
from seedbed.errors import CheckpointError, ConfigError
from seedbed.runs.grid import cut
from seedbed.runs.history import History, Stage, find_history
from seedbed.runs.lineage import (
    MatrixRow,
    against,
    backward_transfer,
    forgetting,
    gain_kept,
    matrix,
    method_in_words,
)

LONGEST_NAME = 24
SAME_START = 1e-3
"""Relative difference in bits per byte within which two runs began from the same model and the same text."""


def print_lineage(path: Path, run: Path, summary: Mapping[str, Any], baseline: Path | None, *, as_json: bool) -> None:
    """The history of the model in `path`, whose run has this summary; against that of a `baseline`, if one is given.

    Raises:
        ConfigError: the baseline did not learn the same domain.
        CheckpointError: a model has no history, or a damaged one.
    """
    history = _history(path)
    naive = _same_domain(baseline, _newest(history).domain) if baseline else None
    if as_json:
        print_json({"run": str(run), **summary, **_lineage_json(history, naive)})
        return
    print_lines(_lineage_lines(history, naive, baseline))


def _history(path: Path) -> History:
    history = find_history(path)
    if history is None:
        raise CheckpointError(
            f"{path}: its model has no history; begin one: seedbed continue --model {path} --data FILE --domain NAME"
        )
    return history


def _newest(history: History) -> Stage:
    """The newest stage that was learnt to its end; the base when there is none."""
    return next((stage for stage in reversed(history.stages[1:]) if stage.after), history.stages[0])


def _same_domain(baseline: Path, domain: str) -> Stage:
    """The stage in which the baseline learnt `domain`.

    Raises:
        ConfigError: the baseline did not learn it.
        CheckpointError: the baseline's model has no history, or a damaged one.
    """
    history = _history(baseline)
    stage = history.stage(domain)
    if stage is None:
        learnt = ", ".join(history.domains)
        raise ConfigError(f"--baseline {baseline} learnt {learnt}; expected a run that learnt {domain}")
    return stage


def _lineage_json(history: History, naive: Stage | None) -> dict[str, Any]:
    compared = against(_newest(history), naive) if naive else None
    return {
        "stages": history.to_json()["stages"],
        "matrix": [asdict(row) for row in matrix(history)],
        "backward_transfer": backward_transfer(history),
        "gain_kept": {domain: gain_kept(history, domain) for domain in history.domains[1:]},
        "gain_share": compared.gain_share if compared else None,
        "forgetting_avoided": compared.forgetting_avoided if compared else None,
    }


def _lineage_lines(history: History, naive: Stage | None, baseline: Path | None) -> Iterator[str]:
    yield from _chain(history)
    yield ""
    if rows := [row for row in matrix(history) if row.figures]:
        yield "Bits per byte of held-out text (nats per token) after each stage:"
        yield from _table(rows, history.domains)
        yield ""
    yield from wrapped(_transfer_sentence(history))
    yield from wrapped(_gains_sentence(history))
    if naive:
        yield from wrapped(f"Against {baseline}: {_comparison(_newest(history), naive)}")


def _chain(history: History) -> Iterator[str]:
    """The stages from the base down, each with its method, what it did, and where it is."""
    width = min(LONGEST_NAME, max(map(len, history.domains)))
    for number, stage in enumerate(history.stages):
        bar = "|" if number + 1 < len(history.stages) else " "
        name = _short(stage.domain)
        first = f"* {name:<{width}}  "
        rest = f"{bar:<{width + 4}}"
        for about in _about(stage, is_base=number == 0):
            yield from wrap(about, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
            first = rest
        yield f"{first}{_place(stage)}"  # not wrapped, so that it can be copied
        if bar == "|":
            yield bar


def _about(stage: Stage, *, is_base: bool) -> Iterator[str]:
    if is_base:
        return
    yield method_in_words(stage.method) + ("" if stage.after else " (being learnt)")
    if stage.why:
        yield f"auto: {stage.why}"
    own = stage.domain
    if own in stage.before and own in stage.after:
        figures = f"{stage.before[own].bits_per_byte:.4f} -> {stage.after[own].bits_per_byte:.4f} bits per byte"
        rises = [
            f"{_short(domain)} {_percent(forgetting(before, stage.after[domain]), '+')}"
            for domain, before in stage.before.items()
            if domain != own and domain in stage.after
        ]
        yield figures + (f"; forgetting: {', '.join(rises)}" if rises else "")


def _place(stage: Stage) -> str:
    """The run folder of a stage, or the model folder where there is none; and whether it is still there."""
    place = stage.run or stage.model
    if not Path(place).exists():
        return f"{place} (missing)"
    gone = stage.model and not Path(stage.model).exists()
    return f"{place} (its model is missing: {stage.model})" if gone else place


def _table(rows: Sequence[MatrixRow], domains: Sequence[str]) -> Iterator[str]:
    """Stages down, domains across; columns that do not fit follow in a further block."""
    measured = [domain for domain in domains if any(domain in row.figures for row in rows)]
    label = max(len(_short(row.domain)) for row in rows)
    column = max(len("1.2345 (1.2345)"), *(len(_short(domain)) for domain in measured))
    at_once = max(1, (WIDTH - label) // (column + 2))
    for start in range(0, len(measured), at_once):
        block = measured[start : start + at_once]
        yield " " * label + "".join(f"  {_short(domain):>{column}}" for domain in block)
        for row in rows:
            yield f"{_short(row.domain):<{label}}" + "".join(f"  {_cell(row, domain):>{column}}" for domain in block)


def _cell(row: MatrixRow, domain: str) -> str:
    figure = row.figures.get(domain)
    return f"{figure.bits_per_byte:.4f} ({figure.loss:.4f})" if figure else "-"


def _transfer_sentence(history: History) -> str:
    transfer = backward_transfer(history)
    if transfer is None:
        return "Backward transfer: unknown, because no earlier domain was measured."
    return f"Backward transfer: {transfer:+.4f} bits per byte; below zero is forgetting."


def _gains_sentence(history: History) -> str:
    kept = {domain: gain_kept(history, domain) for domain in history.domains[1:]}
    shares = ", ".join(f"{_short(domain)} {_percent(share)}" for domain, share in kept.items() if share is not None)
    return f"Of each gain there is left: {shares or 'nothing to tell, because nothing was gained and measured'}."


def _comparison(stage: Stage, naive: Stage) -> str:
    compared = against(stage, naive)
    if compared is None:
        return "no comparison, because one of them has no figures or the baseline gained nothing."
    avoided = (
        "and it forgot nothing itself"
        if compared.forgetting_avoided is None
        else f"and {_percent(compared.forgetting_avoided)} of its forgetting avoided"
    )
    sentence = f"{_percent(compared.gain_share)} of its gain on {_short(stage.domain)}, {avoided}."
    both = stage.before.keys() & naive.before.keys()
    if any(abs(forgetting(stage.before[domain], naive.before[domain])) > SAME_START for domain in both):
        sentence += " They did not begin from the same figures, so the comparison is rough."
    return sentence


def _percent(share: float, sign: str = "") -> str:
    return f"{share * 100:{sign}.1f} %"


def _short(name: str) -> str:
    """A name that a column can hold."""
    return cut(name, LONGEST_NAME)
