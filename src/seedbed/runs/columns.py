"""What can be said of a run in a word or a number: one list of columns, each documented once.

The table, its help, filters, sorting, comparisons and sweeps are made from `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seedbed.config import STRENGTHS
from seedbed.errors import ConfigError, did_you_mean
from seedbed.runs.folder import is_being_written
from seedbed.runs.info import RunInfo
from seedbed.runs.parents import changed_options
from seedbed.runs.values import duration, is_number, memory, plain, size


@dataclass(frozen=True)
class Column:
    """One thing that the table says of a run."""

    name: str
    heading: str
    about: str
    """What it is, with its unit."""
    get: Callable[[RunInfo], Any]
    """Its raw value, which JSON can hold; None where it is unknown."""
    form: Callable[[Any], str] = str
    """A known value as text."""
    better: Literal["lower", "higher"] | None = None
    least: int | None = None
    """How many characters are enough when room is short; None for a number, which is not cut."""


def cell(value: Any, column: Column) -> str:
    """A value as the table shows it; nothing where it is unknown."""
    return "" if value is None else column.form(value)


def score(value: Any) -> Any:
    """The number to sort by: of a judge's score with its band the score; anything else as it is."""
    return value["score"] if isinstance(value, Mapping) else value


def check_columns(names: Sequence[str]) -> list[str]:
    """The names, `all` standing for every column.

    Raises:
        ConfigError: every name that no column has.
    """
    known = list(COLUMNS)
    if unknown := [name for name in names if name not in (*known, "all")]:
        hints = [f"--columns {name}: no such column{did_you_mean(name, known)}" for name in unknown]
        raise ConfigError([*hints, f"columns: {', '.join(known)}, or all"])
    return known if "all" in names else list(dict.fromkeys(names))


def status(run: RunInfo) -> str:
    """`status` of the summary; `killed` where it says `running` and nobody writes; `not begun` before the first step.

    A run whose options (`load_runs`) or summary (`read_run`) could not be read is `unreadable`.
    """
    told = run.summary.get("status")
    if told not in (None, "running"):
        return str(told)
    if is_being_written(run.path):
        return "running"
    return "killed" if told else "not begun"


def _changed(run: RunInfo) -> str | None:
    return ", ".join(f"{name} {_from_to(*change)}" for name, change in changed_options(run).items()) or None


def _from_to(old: Any, new: Any) -> str:
    """Both values, of absolute paths the last part if that tells them apart."""
    brief = [Path(text).name if text.startswith("/") else text for text in (plain(old), plain(new))]
    return " -> ".join(brief if brief[0] != brief[1] else (plain(old), plain(new)))


def _has_adapters(run: RunInfo) -> bool:
    return run.regime in ("lora", "continue-lora")


def _method(run: RunInfo) -> str | None:
    """What is trained, and how what was known is kept."""
    if not run.regime:
        return None
    if run.regime == "scratch":
        return "scratch"
    blocks, frozen = run.options.get("last_blocks"), run.options.get("freeze")
    parts = ["lora"] if _has_adapters(run) else [] if blocks or frozen else ["whole"]
    parts += [f"last {blocks} blocks"] if blocks else []
    parts += [f"without {frozen}"] if frozen else []
    trained = " ".join(parts)
    return f"continue {_keeping(run)}, {trained}" if run.regime.startswith("continue") else trained


def _keeping(run: RunInfo) -> str:
    """The ways that held the model to what it knew, as the run's summary or else its options tell."""
    used = run.summary.get("method")
    if not isinstance(used, Mapping):
        return plain(run.options.get("method"))
    strengths = [name if used[name] is True else f"{name} {plain(used[name])}" for name in STRENGTHS if used.get(name)]
    return " + ".join(strengths) or "naive"


def _batch(run: RunInfo) -> str | None:
    batch, *times = (run.options.get(name) for name in ("batch_size", "grad_accumulation", "processes"))
    return None if batch is None else " x ".join(map(str, [batch, *(n for n in times if n not in (None, 1))]))


def _warmup(run: RunInfo) -> Any:
    steps = run.options.get("warmup_steps")
    return run.options.get("warmup_ratio") if steps is None else steps


def _warmup_in_words(value: Any) -> str:
    return f"{value} steps" if isinstance(value, int) and value else plain(value)


def _judge(run: RunInfo) -> dict[str, float] | None:
    judge = run.summary.get("judge")
    if not isinstance(judge, Mapping) or not is_number(judge.get("score")):
        return None
    return {name: judge[name] for name in ("score", "low", "high") if is_number(judge.get(name))}


def _score_and_band(judge: Mapping[str, float]) -> str:
    score = f"{judge['score']:.1f}"
    return f"{score} ± {(judge['high'] - judge['low']) / 2:.1f}" if {"low", "high"} <= judge.keys() else score


def _figure(name: str) -> Callable[[RunInfo], Any]:
    """A number of the summary."""

    def get(run: RunInfo) -> Any:
        value = run.summary.get(name)
        return value if is_number(value) else None

    return get


def _word(name: str) -> Callable[[RunInfo], str | None]:
    """A text of the summary."""

    def get(run: RunInfo) -> str | None:
        value = run.summary.get(name)
        return value if isinstance(value, str) and value else None

    return get


def _option(name: str, when: Callable[[RunInfo], bool] = lambda _run: True) -> Callable[[RunInfo], Any]:
    def get(run: RunInfo) -> Any:
        value = run.options.get(name) if when(run) else None
        return value if value is None or is_number(value) else plain(value)

    return get


def _epochs(run: RunInfo) -> Any:
    """Passes over the text: as many as were made, where another option says how long the run is."""
    text, steps = run.summary.get("text"), run.summary.get("steps")
    limited = any(run.options.get(name) for name in ("max_steps", "max_tokens"))
    if limited and isinstance(text, dict) and is_number(steps) and is_number(text.get("steps_per_epoch")):
        return round(steps / max(1, text["steps_per_epoch"]), 2)
    return _option("epochs")(run)


def _number(spec: str) -> Callable[[Any], str]:
    """How numbers are written; a config file that was edited by hand may hold a text in their place."""
    return lambda value: format(value, spec) if is_number(value) else str(value)


def _short_place(place: str) -> str:
    """The name of a run or model folder; a hub id as it is.

    >>> _short_place("/models/runs/book/checkpoints/best"), _short_place("HuggingFaceTB/SmolLM2-135M")
    ('book', 'HuggingFaceTB/SmolLM2-135M')
    """
    path = Path(place)
    if path.parent.name == "checkpoints":
        path = path.parents[1]
    return path.name if path.is_absolute() or len(path.parts) > 2 or path.parts[:1] == ("runs",) else str(path)


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("name", "run", "The run folder's name.", lambda run: run.name, least=32),
        Column(
            "parent", "parent", "The run, checkpoint or model it began from.", _word("parent"), _short_place, least=16
        ),
        Column("changed", "changed", "The options that differ from the parent run's.", _changed, least=20),
        Column("model", "model", "`--model`.", _option("model"), _short_place, least=14),
        Column("parameters", "parameters", "Weights in all.", _figure("parameters"), size),
        Column("trainable", "trainable", "Weights that are trained.", _figure("trainable_parameters"), size),
        Column(
            "method",
            "method",
            "scratch, whole, lora, last N blocks; continue, and how what was known is kept.",
            _method,
            least=12,
        ),
        Column("batch", "batch", "`--batch_size`, times `--grad_accumulation`, times processes.", _batch, least=8),
        Column("epochs", "epochs", "`--epochs`; passes made, where steps or tokens end it.", _epochs, _number("g")),
        Column("steps", "steps", "Optimizer updates done.", _figure("steps"), _number(",")),
        Column("optimizer", "optimizer", "`--optimizer`.", _option("optimizer"), least=9),
        Column("lr", "lr", "Peak learning rate, `--learning_rate`.", _option("learning_rate"), _number("g")),
        Column("min_lr", "min lr", "Learning rate at the end, `--min_lr`.", _option("min_lr"), _number("g")),
        Column("warmup", "warm-up", "Warm-up: below 1 a share of the run, else steps.", _warmup, _warmup_in_words),
        Column("weight_decay", "decay", "`--weight_decay`.", _option("weight_decay"), _number("g")),
        Column("rank", "rank", "`--lora_r`, with LoRA.", _option("lora_r", _has_adapters), _number("g")),
        Column("alpha", "alpha", "`--lora_alpha`, with LoRA.", _option("lora_alpha", _has_adapters), _number("g")),
        Column(
            "train_loss",
            "train loss",
            "Training loss in nats per token, mean of the last 50 steps.",
            _figure("train_loss"),
            _number(".4f"),
            better="lower",
        ),
        Column(
            "val_loss",
            "val loss",
            "Best validation loss in nats per token; compares only with the same tokenizer.",
            _figure("best_val_loss"),
            _number(".4f"),
            better="lower",
        ),
        Column("perplexity", "ppl", "exp(val_loss).", _figure("best_val_ppl"), _number(",.2f"), better="lower"),
        Column(
            "bits_per_byte",
            "bits/byte",
            "Of the held-out text at the best step; compares across tokenizers.",
            _figure("bits_per_byte"),
            _number(".4f"),
            better="lower",
        ),
        Column(
            "judge",
            "judge",
            "Score of `seedbed judge`, 0 to 100, with half the width of its 95 % interval.",
            _judge,
            _score_and_band,
            better="higher",
        ),
        Column(
            "tokens_per_second",
            "tokens/s",
            "Targets learnt a second, in the last sitting.",
            _figure("tokens_per_second"),
            _number(",.0f"),
            better="higher",
        ),
        Column("time", "time", "Time spent, raw in hours.", _figure("hours"), duration, better="lower"),
        Column(
            "peak_memory", "memory", "Most memory used, raw in MB.", _figure("peak_memory_mb"), memory, better="lower"
        ),
        Column("device", "device", "Where it ran.", _word("device"), least=12),
        Column("seed", "seed", "`--seed`.", _option("seed"), _number("d")),
        Column(
            "status",
            "status",
            "done, early_stopped, time_limit, interrupted, diverged, failed, running; killed: it says running and "
            "nobody writes; not begun; unreadable: its config.yaml or metrics.json is damaged.",
            status,
            least=13,
        ),
        Column("notes", "notes", "What `seedbed runs note` wrote.", _word("notes"), least=16),
        Column("path", "path", "The run folder.", lambda run: str(run.path), least=32),
    )
}

SHOWN_BY_DEFAULT = (
    *("name", "val_loss", "status", "changed", "lr", "method", "judge", "bits_per_byte"),
    *("time", "notes", "peak_memory", "batch", "epochs", "rank", "model"),
)
"""The columns that are shown when nobody chose any, the most telling first."""
