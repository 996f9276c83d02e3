"""What is marked on the curves of a run: its events, its best checkpoint, and the steps that findings name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from seedbed.findings import Finding
from seedbed.runs.folder import read_records
from seedbed.runs.info import RunInfo
from seedbed.runs.values import is_number

MOST_OF_A_KIND = 100  # marks; more of them are drawn as so many, evenly spread


@dataclass(frozen=True)
class Kind:
    """How marks of one kind look; `symbol` is plotly's."""

    name: str
    symbol: str
    colour: str
    on_validation: bool = False
    """Whether it stands on the curve of the validation loss."""


BEST = Kind("best checkpoint", "star", "#22935b", on_validation=True)
FINDING = Kind("finding", "triangle-down", "#b7791f")
KINDS = {
    "loss_spike": Kind("loss spike", "triangle-up", "#d64545"),
    "skipped_step": Kind("skipped step", "x", "#d64545"),
    "resume": Kind("resumed", "circle-open", "#7b8494"),
    "forgetting": Kind("forgetting", "diamond", "#a76bcf", on_validation=True),
    "finding": FINDING,
}
"""By the event's name in `events.jsonl`."""


@dataclass(frozen=True)
class Mark:
    """One thing that happened at a step."""

    kind: Kind
    step: float
    text: str


def marks_of(run: RunInfo, findings: Iterable[Finding]) -> list[Mark]:
    """Everything to mark, by kind and step."""
    by_kind: dict[str, list[Mark]] = {}
    for mark in [*_marks_of_events(run), *_marks_of_findings(findings)]:
        by_kind.setdefault(mark.kind.name, []).append(mark)
    marks = [mark for found in by_kind.values() for mark in _spread(found)]
    if is_number(step := run.summary.get("best_step")):
        marks.append(Mark(BEST, float(step), f"best checkpoint: step {step:,}"))
    return marks


def _marks_of_events(run: RunInfo) -> Iterator[Mark]:
    for event in read_records(run.path / "events.jsonl"):
        kind, step = KINDS.get(str(event.get("event"))), event.get("step")
        if kind and is_number(step):
            yield Mark(kind, float(step), f"{kind.name} at step {step:,}{_details(event)}")


def _marks_of_findings(findings: Iterable[Finding]) -> Iterator[Mark]:
    for finding in findings:
        name = finding.name.replace("_", " ")
        for key, since in (("step", "at"), ("from_step", "from")):
            if is_number(step := finding.evidence.get(key)):
                yield Mark(FINDING, float(step), f"{name}, {since} step {step:,.0f}")


def _details(event: Mapping[str, Any]) -> str:
    match event:
        case {"event": "loss_spike", "loss": int() | float() as loss, "usual": int() | float() as usual}:
            return f": {loss:.4g}, usual {usual:.4g}"
        case {"event": "skipped_step", "reason": str(reason)}:
            return f": {reason}"
        case {"event": "resume", "checkpoint": str(checkpoint)}:
            return f" from {checkpoint.rpartition('/')[2]}"
        case {"event": "forgetting", "beyond": dict(beyond)}:
            rises = [f"{domain} +{100 * rise:.1f} %" for domain, rise in beyond.items() if is_number(rise)]
            return f": {', '.join(rises)}"
        case {"event": "finding", "name": str(name)}:
            return f": {name.replace('_', ' ')}"
    return ""


def _spread(marks: list[Mark]) -> list[Mark]:
    """At most `MOST_OF_A_KIND`, the first and the last among them."""
    ordered = sorted(marks, key=lambda mark: mark.step)
    last = len(ordered) - 1
    if last < MOST_OF_A_KIND:
        return ordered
    return [ordered[round(place * last / (MOST_OF_A_KIND - 1))] for place in range(MOST_OF_A_KIND)]
