"""The printing of one run: `seedbed runs show RUN`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from seedbed.cli.console import WIDTH, fact_lines
from seedbed.config import Origin, origin_of
from seedbed.runs.columns import COLUMNS, cell, status
from seedbed.runs.grid import printable, text_grid
from seedbed.runs.info import RunInfo
from seedbed.runs.parents import chosen_options
from seedbed.runs.series import read_series
from seedbed.runs.values import as_json, duration, is_number, memory, plain

TEXT = {
    "train_documents": "training documents",
    "train_bytes": "training bytes",
    "train_rows": "rows",
    "tokens_per_epoch": "tokens an epoch",
    "steps_per_epoch": "steps an epoch",
    "padding": "padding",
    "truncated_documents": "documents cut short",
    "longest": "longest document in tokens",
    "val_documents": "held-out documents",
    "val_bytes": "held-out bytes",
    "val_tokens": "held-out tokens",
}
"""The entries of the summary's `text` that are shown, in words."""


def run_as_json(run: RunInfo) -> dict[str, Any]:
    """The summary, and for a run whose options are there these, their sources and what was noticed."""
    if not run.options:
        return {"run": str(run.path), **run.summary}
    return {
        "run": str(run.path),
        **run.summary,
        "status": status(run),
        "regime": run.regime,
        "options": {name: as_json(value) for name, value in run.options.items()},
        "sources": {name: str(source) for name, source in run.sources.items()},
        "findings": recorded_findings(run),
    }


def run_lines(run: RunInfo) -> Iterator[str]:
    """All that is known of a run, in parts with a line between them."""
    yield from _aligned(_facts(run))
    parts = {
        "Forecast and what happened:": _forecast(run),
        "Text:": _aligned(_text(run.summary.get("text"))),
        "Options that differ from the defaults:": _options(run),
        "Noticed:": _noticed(run),
    }
    for title, lines in parts.items():
        if lines:
            yield from ("", title, *(f"  {line}" for line in lines))


def recorded_findings(run: RunInfo) -> list[dict[str, Any]]:
    """What was said before the run and what the run noticed itself, in order."""
    return [*run.events("guardrail"), *run.events("finding")]


def _facts(run: RunInfo) -> dict[str, str | None]:
    """What became of the run; None for what is unknown."""
    summary = run.summary
    steps, total = _number(summary.get("steps"), ","), _number(summary.get("total_steps"), ",")
    loss, best = _number(summary.get("best_val_loss"), ".4f"), _number(summary.get("best_step"), ",")
    return {
        "Run": str(run.path),
        "Status": status(run),
        "Reason": _word(summary.get("reason")),
        "Model": _column(run, "model"),
        "Method": _column(run, "method"),
        "Parameters": _parameters(run),
        "Changed": _column(run, "changed"),
        "Steps": f"{steps} of {total}" if steps and total else steps,
        "Tokens": _number(summary.get("tokens"), ","),
        "Training loss": _in_nats(_number(summary.get("train_loss"), ".4f")),
        "Best validation loss": _in_nats(loss) and f"{_in_nats(loss)}{f' at step {best}' if best else ''}",
        "Last validation loss": _last_validation(run) if run.options else None,
        "Perplexity": _number(summary.get("best_val_ppl"), ".3f"),
        "Bits per byte": _number(summary.get("bits_per_byte"), ".4f"),
        "Judge": _column(run, "judge"),
        "Hours": _number(summary.get("hours"), ".3f"),
        "Tokens per second": _number(summary.get("tokens_per_second"), ",.0f"),
        "Peak memory": _column(run, "peak_memory"),
        "Device": _word(summary.get("device")),
        "Parent": _word(summary.get("parent")),
        "Notes": _word(summary.get("notes")),
    }


def _column(run: RunInfo, name: str) -> str | None:
    return cell(COLUMNS[name].get(run), COLUMNS[name]) or None


def _parameters(run: RunInfo) -> str | None:
    total, trained = (_number(run.summary.get(name), ",") for name in ("parameters", "trainable_parameters"))
    return f"{total}, {trained} of them trained" if total and trained and total != trained else total


def _last_validation(run: RunInfo) -> str | None:
    """The loss of the last validation, where that is not the best one."""
    found = read_series(run.path).get("val_loss")
    if found is None or not len(found) or found.step[-1] == run.summary.get("best_step"):
        return None
    return f"{found.values[-1]:.4f} nats per token at step {found.step[-1]:,.0f}"


def _number(value: object, spec: str) -> str | None:
    return format(value, spec) if is_number(value) else None


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _in_nats(loss: str | None) -> str | None:
    return loss and f"{loss} nats per token"


def _aligned(facts: Mapping[str, str | None]) -> list[str]:
    """The known facts in two columns."""
    return fact_lines({name: printable(value) for name, value in facts.items() if value is not None})


def _forecast(run: RunInfo) -> list[str]:
    forecast = run.summary.get("forecast")
    if not isinstance(forecast, Mapping):
        return []
    rows = []
    for name, key, form in (("peak memory", "peak_memory_mb", memory), ("time", "hours", duration)):
        before, after = forecast.get(key), run.summary.get(key)
        if is_number(before) and is_number(after):
            apart = f"{after / before - 1:+.0%}" if before else ""
            rows.append((name, form(before), form(after), apart))
    return text_grid(("", "forecast", "measured", ""), rows, (0, None, None, None)) if rows else []


def _text(text: object) -> dict[str, str | None]:
    if not isinstance(text, Mapping):
        return {}
    shares = {"padding": ".1%"}
    return {words: _number(text.get(name), shares.get(name, ",")) for name, words in TEXT.items()}


def _options(run: RunInfo) -> list[str]:
    """Those that somebody chose first, then those that follow from a preset or the model."""
    rows = [(name, plain(value), source) for name, (value, source) in chosen_options(run).items()]
    rows.sort(key=lambda row: origin_of(row[2]) is not Origin.USER)
    return text_grid(("option", "value", "from"), rows, (0, 60, 40), WIDTH) if rows else []


def _noticed(run: RunInfo) -> list[str]:
    lines = []
    for finding in recorded_findings(run):
        step = finding.get("step")
        when = f"step {step:,}" if isinstance(step, int) and step else "before the first step"
        words = (finding.get("level"), f"({when}):", f"{finding.get('message')}.", finding.get("remedy"))
        lines += wrap(printable(" ".join(str(word) for word in words if word)), WIDTH - 2, subsequent_indent="  ")
    return lines
