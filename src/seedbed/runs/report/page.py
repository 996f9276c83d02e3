"""What the page of a run says, and that of a comparison: plain values for the templates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from seedbed.config import REGIMES, Origin, origin_of
from seedbed.findings import Finding
from seedbed.runs.columns import COLUMNS, cell, score, status
from seedbed.runs.folder import FINISHED, read_records
from seedbed.runs.info import RunInfo
from seedbed.runs.report.curves import Figure, Line, figures_of_run, figures_of_runs
from seedbed.runs.report.marks import marks_of
from seedbed.runs.report.words import change, flags_to_copy, pieces, show
from seedbed.runs.table import table
from seedbed.runs.values import duration, is_number, memory, size

if TYPE_CHECKING:
    from seedbed.runs.compare import Comparison

Content = dict[str, Any]
Cells = tuple[Any, ...]

MOST_SAMPLES = 24  # of one prompt
AXES = {"step": "Steps", "tokens": "Tokens", "time": "Time", "epoch": "Epochs"}
ENDED_BADLY = ("diverged", "failed", "not begun", "unreadable")


def page_of_run(run: RunInfo) -> Content:
    """Values of `run.html.jinja`."""
    from seedbed.runs.diagnose import find, read_facts

    facts = read_facts(run.path)
    findings = find(facts)
    figures = figures_of_run(facts.series, marks_of(run, findings), _figure(run.options, "max_grad_norm"))
    ended = status(run)
    return {
        "title": run.name,
        "status": ended.replace("_", " "),
        "mood": "good" if ended in FINISHED else "bad" if ended in ENDED_BADLY else "open",
        "sentence": sentence(run),
        "reason": run.summary.get("reason") or "",
        "notes": run.summary.get("notes") or "",
        "where": str(run.path.resolve()),
        "tiles": list(tiles(run.summary)),
        "forecast": list(forecast(run.summary)),
        "findings": [said(finding) for finding in findings],
        "said_before": [said(finding) for finding in guardrails(run)],
        "domains": list(domains(run.summary)),
        "samples": samples(run),
        "options": options(run),
        "summary": list(entries(run.summary)),
        **curves(figures),
    }


def page_of_runs(runs: Sequence[RunInfo]) -> Content:
    """Values of `comparison.html.jinja`."""
    from seedbed.runs.compare import compare
    from seedbed.runs.diagnose import find, read_facts

    comparison = compare(runs)
    facts = [read_facts(run.path) for run in runs]
    lines = [Line(group.name, [facts[place].series for place in group.members]) for group in comparison.groups]
    diagnoses = [[said(finding) for finding in find(each)] for each in facts]
    return {
        "title": f"{len(runs)} runs compared",
        "comparison": comparison,
        "verdicts": verdicts(comparison),
        "table": runs_table(runs),
        "options": [(name, [show(value) for value in values]) for name, values in comparison.options.items()],
        "groups": [group for group in comparison.groups if len(group.members) > 1],
        "diagnoses": list(zip(comparison.names, diagnoses, strict=True)),
        **curves(figures_of_runs(lines)),
    }


def curves(figures: list[Figure]) -> Content:
    """The figures, the entries of their common legend in the order of appearance, and the axes to choose from."""
    legend: dict[str, dict[str, str]] = {}
    for trace in (trace for figure in figures for trace in figure["data"]):
        name, line = trace["legendgroup"], trace.get("line", {})
        if trace["mode"] == "markers":
            legend.setdefault(name, {"colour": trace["marker"]["color"], "dash": "mark"})
        elif name and "color" in line:
            legend.setdefault(name, {"colour": line["color"], "dash": line.get("dash", "solid")})
    axes = [axis for axis in AXES if axis == "step" or any(_moves(figure, axis) for figure in figures)]
    return {"figures": figures, "legend": legend, "axes": {axis: AXES[axis] for axis in axes}}


def sentence(run: RunInfo) -> str:
    """What the run is: `Training LoRA adapters: SmolLM2 (135M parameters, 5M of them trained) on questions.json`."""
    doing = REGIMES[run.regime].doing if run.regime in REGIMES else run.regime
    words = f"{doing[:1].upper()}{doing[1:]}: {_last_part(run.options.get('model') or 'a model')}"
    total, trained = _figure(run.summary, "parameters"), _figure(run.summary, "trainable_parameters")
    if total:
        words += f" ({size(total)} parameters"
        words += f", {size(trained)} of them trained)" if trained and trained != total else ")"
    data = run.options.get("data") or []
    if names := [_last_part(name) for name in (data if isinstance(data, list) else [data])]:
        words += f" on {', '.join(names)}"
    machine = [str(run.summary[name]) for name in ("device", "precision") if run.summary.get(name)]
    return "; ".join([words, ", ".join(machine)] if machine else [words])


def tiles(summary: Mapping[str, Any]) -> Iterator[Cells]:
    """Name, value and a remark of each figure that says most of a run."""
    best, tokens, total = (_figure(summary, name) for name in ("best_step", "tokens", "total_steps"))
    steps = _figure(summary, "steps")
    left = f"of {total:,.0f}" if total and total != steps else ""
    figures: list[tuple[str, str, Callable[[float], str], str]] = [
        ("validation loss", "best_val_loss", show, f"best, step {best:,.0f}" if best else ""),
        ("perplexity", "best_val_ppl", show, "validation"),
        ("bits per byte", "bits_per_byte", show, "validation"),
        ("training loss", "train_loss", show, "at the end"),
        ("steps", "steps", show, left or (f"{size(tokens)} tokens" if tokens else "")),
        ("speed", "tokens_per_second", show, "tokens/s"),
        ("time", "hours", duration, ""),
        ("peak memory", "peak_memory_mb", memory, ""),
    ]
    for heading, name, form, remark in figures:
        if (value := _figure(summary, name)) is not None:
            yield heading, form(value), remark


def forecast(summary: Mapping[str, Any]) -> Iterator[Cells]:
    """Of each figure that was forecast its name, the forecast, what came, and the difference."""
    told = _mapping(summary, "forecast")
    forms = {"peak_memory_mb": ("peak memory", memory), "hours": ("time", duration)}
    for name, (heading, form) in forms.items():
        expected, actual = _figure(told, name), _figure(summary, name)
        if expected is None or actual is None:
            continue
        ended = name != "hours" or summary.get("status") == "done"
        difference = change(actual / expected - 1) if expected and ended else "not run to its end" if not ended else ""
        yield heading, form(expected), form(actual), difference


def guardrails(run: RunInfo) -> Iterator[Finding]:
    """What was said before the first step."""
    for event in run.events("guardrail"):
        level = event.get("level")
        yield Finding(
            name=str(event.get("name", "")),
            level=level if level in ("warning", "error") else "note",
            message=str(event.get("message", "")),
            evidence={},
            remedy=str(event.get("remedy", "")),
        )


def said(finding: Finding) -> Content:
    """A finding with its flags told apart from its words."""
    return {
        "name": finding.name.replace("_", " "),
        "level": finding.level,
        "message": pieces(finding.message),
        "remedy": pieces(finding.remedy),
        "flags": flags_to_copy(finding.remedy),
    }


def domains(summary: Mapping[str, Any]) -> Iterator[Cells]:
    """Of each domain its name, bits per byte before and after, and the relative rise."""
    for name, figures in _mapping(summary, "domains").items():
        if isinstance(figures, dict):
            before, after = (_figure(_mapping(figures, when), "bits_per_byte") for when in ("before", "after"))
            yield name, show(before), show(after), change(_figure(figures, "forgetting"))


def samples(run: RunInfo) -> list[tuple[str, list[Cells], int]]:
    """Of each prompt its samples (step, text), oldest first and the last among them, and how many there were."""
    by_prompt: dict[str, list[Cells]] = {}
    for record in read_records(run.path / "samples.jsonl"):
        found = by_prompt.setdefault(str(record.get("prompt", "")), [])
        found.append((show(record.get("step")), str(record.get("text", ""))))
    return [(prompt, _some(found), len(found)) for prompt, found in by_prompt.items()]


def options(run: RunInfo) -> dict[str, list[Cells]]:
    """Name, value and source of the options that the user chose, and of the rest."""
    parts: dict[str, list[Cells]] = {"chosen": [], "rest": []}
    for name, value in run.options.items():
        source = run.source(name)
        part = "chosen" if origin_of(source) is Origin.USER else "rest"
        parts[part].append((name, show(value), source))
    return parts


def entries(summary: Mapping[str, Any]) -> Iterator[Cells]:
    """Name and value of every entry that has one, nested ones as `text.train_rows`."""
    for name, value in summary.items():
        if name == "domains":
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", show(part)) for key, part in value.items())
        elif value not in (None, ""):
            yield name, show(value)


def verdicts(comparison: Comparison) -> dict[str, list[str]]:
    """Those on the best of the groups, if all of them compare, and the rest."""
    pairs = list(zip(combinations(comparison.groups, 2), comparison.verdicts, strict=True))
    measured = [group for group in comparison.groups if group.val_loss is not None]
    measure = comparison.measure
    if measure is None or not measured:
        return {"leading": [], "rest": list(comparison.verdicts)}
    best = min(measured, key=lambda group: getattr(group, measure) or math.inf)
    return {
        "leading": [verdict for pair, verdict in pairs if best in pair],
        "rest": [verdict for pair, verdict in pairs if best not in pair],
    }


def runs_table(runs: Sequence[RunInfo]) -> Content:
    """Headings, rows of cells (text, whether it is the best of its column), and what is the same in all of the runs.

    Results stand before options; empty columns are left out.
    """
    rows = table(runs)
    columns = [column for name, column in COLUMNS.items() if name not in ("name", "path")]
    filled = [column for column in columns if any(row[column.name] is not None for row in rows)]
    same = [column for column in filled if all(row[column.name] == rows[0][column.name] for row in rows)]
    differing = sorted((column for column in filled if column not in same), key=lambda column: column.better is None)
    shown = [COLUMNS["name"], *differing]
    best: dict[str, Any] = {}
    for column in shown:
        values = [score(row[column.name]) for row in rows if row[column.name] is not None]
        if column.better and len(values) > 1:
            best[column.name] = min(values) if column.better == "lower" else max(values)
    cells = [
        [(cell(row[column.name], column), score(row[column.name]) == best.get(column.name, row)) for column in shown]
        for row in rows
    ]
    return {
        "headings": [(column.heading, column.about) for column in shown],
        "rows": cells,
        "same": [(column.heading, cell(rows[0][column.name], column)) for column in same],
    }


def _figure(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return value if is_number(value) else None


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _last_part(place: object) -> str:
    return str(place).rstrip("/").rpartition("/")[2]


def _moves(figure: Figure, axis: str) -> bool:
    return any(max(trace["meta"][axis], default=0) > 0 for trace in figure["data"])


def _some(rows: list[Cells]) -> list[Cells]:
    """The first, the last and some between them, if there are too many."""
    last = len(rows) - 1
    if last < MOST_SAMPLES:
        return rows
    return [rows[round(place * last / (MOST_SAMPLES - 1))] for place in range(MOST_SAMPLES)]
