"""Rules about held-out text: learnt by heart, of another kind, worse than before, forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seedbed.findings import Finding, Level
from seedbed.runs.diagnose.facts import Facts, number, short
from seedbed.runs.diagnose.smoothing import relative
from seedbed.runs.parents import BOOKKEEPING

RISEN = 0.01  # share above its best at which a validation loss has risen
RISEN_MUCH = 0.03
APART = 0.1  # share by which held-out and training text of one kind do not differ
FAR_APART = 0.3
TOGETHER = 0.25  # share of the fall of training text by which held-out text of another kind falls as well
NOISE = 0.005  # share by which seeds differ
DATA = ("data", "val_data", "val_split", "format", "train_on_prompt", "chat_template")
UNSET = "unset"
NOT_CHOICES = BOOKKEEPING | {"device", "val_split"}


def overfitting(facts: Facts) -> Iterator[Finding]:
    """The validation loss rises from its best on, and the training loss falls."""
    val = facts.val
    if len(val) < 2:
        return
    best = int(val.values.argmin())
    step, lowest, last = float(val.step[best]), float(val.values[best]), float(val.values[-1])
    rise, after = relative(last, lowest), len(val) - 1 - best
    if after == 0 or rise < (RISEN if after > 1 else RISEN_MUCH) or not _train_falls(facts, step):
        return
    train = [facts.loss_before(at, max(5, facts.curve.records)) for at in (step, facts.steps)]
    yield Finding(
        "overfitting",
        "warning" if rise >= RISEN_MUCH else "note",
        f"from step {step:,.0f} (epoch {val.epoch[best]:.2g}) on the model learns its text by heart: the validation "
        f"loss rose from {lowest:.3f} to {last:.3f} ({rise:+.1%}) while the training loss fell from {train[0]:.3f} to "
        f"{train[1]:.3f}",
        {"from_step": step, "best_val_loss": lowest, "last_val_loss": last, "train_loss": train},
        f"{_best_weights(facts, step)} {_less(facts, float(val.epoch[best]), step)}",
    )


def train_validation_mismatch(facts: Facts) -> Iterator[Finding]:
    """Held-out and training text differ before the model has seen anything twice, or the held-out one stays easier."""
    val, curve = facts.val, facts.curve
    if not len(val) or len(curve) < 4:
        return
    new = np.flatnonzero(val.epoch <= 1.01)  # measured before anything was seen twice
    at = int(new[-1]) if len(new) else len(val) - 1
    held_out, train = float(val.values[at]), _mean_loss(facts, float(val.step[at]))
    gap = relative(held_out, train)
    if abs(gap) < APART or abs(held_out - train) < curve.margin:
        return
    if gap > 0 and (not len(new) or _by_heart(facts, int(new[0]), at)):
        return
    if gap > 0:
        cause = "before anything was seen twice, so the held-out text is of another kind"
        remedy = "Hold out a part of --data itself (--val_split 0.1), or add text such as --val_data holds."
    else:
        cause = "so the held-out text is of an easier kind, or stands in the training text"
        remedy = "Look for held-out text in --data; or hold out a part of it: --val_split 0.1, without --val_data."
    yield Finding(
        "train_validation_mismatch",
        "warning" if abs(gap) >= FAR_APART else "note",
        f"at step {val.step[at]:,.0f} (epoch {val.epoch[at]:.2g}) held-out text costs {held_out:.3f} nats a token and "
        f"training text {train:.3f} ({gap:+.0%}), {cause}",
        {"step": float(val.step[at]), "val_loss": held_out, "train_loss": train},
        remedy,
    )


def worse_than_parent(facts: Facts) -> Iterator[Finding]:
    """The same held-out text costs more than in the run that this one began from."""
    parent = facts.parent
    if parent is None or not facts.finished or not _same_text(facts):
        return
    name = "bits_per_byte" if number(parent.summary, "bits_per_byte") and facts.result("bits_per_byte") else ""
    name = name or "best_val_loss"
    before, now = number(parent.summary, name), facts.result(name)
    if not before or now is None or now <= before * (1 + NOISE):
        return
    changes = _changes(parent.options, facts.run.options)
    said = ", ".join(f"--{option} {old} to {new}" for option, (old, new) in list(changes.items())[:6])
    undo = [f"leave --{name} out" if old == UNSET else f"to --{name} {old}" for name, (old, _) in changes.items()]
    unit = name.replace("_", " ").removeprefix("best ").replace("val loss", "nats per token of validation loss")
    yield Finding(
        "worse_than_parent",
        "warning",
        f"it is worse than {parent.path}, on the same held-out text: {now:.4f} {unit}, and that run had {before:.4f} "
        f"({now / before - 1:+.1%}); what changed is {said or 'nothing but what the weights began with'}",
        {"value": name, "parent": before, "run": now, "changes": {key: list(pair) for key, pair in changes.items()}},
        f"Go back to {parent.path}, {f'or {undo[0]}' if len(undo) == 1 else 'and change one thing at a time'}.",
    )


def forgetting(facts: Facts) -> Iterator[Finding]:
    """What the run itself found at its end."""
    found = [event for event in facts.of("finding") if event.get("name") == "forgetting"]
    if not found:
        return
    event = found[-1]
    level: Level = event["level"] if event.get("level") in ("note", "warning", "error") else "warning"
    evidence = event["evidence"] if isinstance(event.get("evidence"), dict) else {}
    yield Finding("forgetting", level, str(event.get("message", "")), evidence, str(event.get("remedy", "")))


def _train_falls(facts: Facts, step: float) -> bool:
    """Whether the training loss fell after `step`; learning by heart needs no more than that."""
    after = facts.curve.level[facts.curve.step > step]
    if not len(after):
        return False
    return float(after[-2:].mean()) < facts.loss_before(step, max(5, facts.curve.records))


def _by_heart(facts: Facts, first: int, last: int) -> bool:
    """Whether training text alone was learnt between two validations, as where it repeats itself."""
    val = facts.val
    losses = [_mean_loss(facts, float(val.step[at])) for at in (first, last)]
    return first < last and val.values[first] - val.values[last] < TOGETHER * (losses[0] - losses[1])


def _best_weights(facts: Facts, step: float) -> str:
    place = facts.checkpoint("best")
    if place is None:
        return f"Take the weights of about step {step:,.0f}."
    also = " (final/ holds the same)" if facts.status == "early_stopped" else ""
    return f"Use {place}, of step {facts.result('best_step') or step:,.0f}{also}."


def _less(facts: Facts, epoch: float, step: float) -> str:
    """The next run: as long as it was of use, and with what holds against learning by heart."""
    epochs, flags = facts.option("epochs"), []
    limited = facts.option("max_steps") or facts.option("max_tokens")
    if epochs and not limited and math.ceil(epoch) < epochs:
        flags.append(f"--epochs {max(1, math.ceil(epoch))}")
    else:
        flags.append(f"--max_steps {step:.0f}")
    flags.append("--lora_dropout 0.1" if facts.with_lora else "--dropout 0.1")
    return f"Next time: {' and '.join(flags)}, or more text."


def _mean_loss(facts: Facts, step: float) -> float:
    """Mean training loss before `step`: as a validation loss and unlike a median, it counts rare bad rows."""
    before = facts.train[facts.train.step <= step]
    before = before[-max(6, len(before) // 10) :]
    tokens = np.diff(before.tokens, prepend=0.0)[1:]
    if len(tokens) < 2 or not (tokens > 0).all():
        return facts.first_loss if not len(before) else float(np.mean(before.values))
    return float(np.average(before.values[1:], weights=tokens))


def _same_text(facts: Facts) -> bool:
    assert facts.parent is not None
    if any(facts.parent.options.get(name) != facts.run.options.get(name) for name in DATA):
        return False
    sizes = [_val_bytes(summary) for summary in (facts.parent.summary, facts.run.summary)]
    return None in sizes or sizes[0] == sizes[1]


def _val_bytes(summary: Mapping[str, Any]) -> float | None:
    text = summary.get("text")
    return number(text, "val_bytes") if isinstance(text, dict) else None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Options of both runs that differ, as they would be typed; `unset` where one has none."""
    names = [name for name in now if name in before and name not in NOT_CHOICES and before[name] != now[name]]
    return {name: (_typed(before[name]), _typed(now[name])) for name in names}


def _typed(value: object) -> str:
    if value is None:
        return UNSET
    small = isinstance(value, float) and 0 < abs(value) < 1e-2
    return short(value) if small and isinstance(value, float) else f"{value}"
