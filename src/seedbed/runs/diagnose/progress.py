"""Rules about losses that fall too little or not long enough. They speak of runs that have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from seedbed.findings import Finding
from seedbed.runs.diagnose.facts import FIRST_RECORDS, Facts, short, times
from seedbed.runs.diagnose.smoothing import relative
from seedbed.runs.series import Series

FEW_STRETCHES = 8
FLAT = 0.005  # share by which a flat loss falls at most
LITTLE = 0.05  # share of a loss whose fall is slow
SECOND_HALF = 0.35  # share of the fall that comes with the second half of the learning, when it is almost linear
WORTH_MORE = 0.02  # share by which the loss fell in the last quarter
LEAST_NATS = 0.01  # a fall that nobody would notice
STRAIGHT = 0.5  # of a fall between two validations far apart, what is left of it towards the second
WORTH_MUCH_MORE = 0.05
ENOUGH_VALIDATIONS = 4  # to say that they are flat
FAR_BELOW = 3.0  # times below the bottom of the range
SMALL_RANK = 16
CLOSE = 0.05  # share by which held-out text differs from training text of the same kind
STILL_FALLING = 0.01  # share by which a validation loss fell before it turned
ONLY_JUST = 0.01  # share above its best at which a validation loss has only just turned


def learning_rate_too_low(facts: Facts) -> Iterator[Finding]:
    """Below the range, and the loss hardly falls, or as fast at the end as at the beginning."""
    rate, curve = facts.peak_rate, facts.curve
    if not (facts.finished or facts.cut) or rate is None or facts.rate_range is None or facts.times_too_low <= 1:
        return
    if len(curve) < FEW_STRETCHES:
        return
    first, last = float(curve.level[0]), float(curve.level[-2:].mean())
    fall, gain = first - last, gain_of_last_quarter(facts) or 0.0
    slow = fall < LITTLE * first
    linear = _fall_of_second_half(facts) > SECOND_HALF and fall > curve.margin
    if not (slow or linear or gain > WORTH_MORE / 2):
        return
    doing, low, high = facts.rate_range
    how = "hardly" if slow else "still in the last quarter" if gain > WORTH_MORE / 2 else "as fast at the end as before"
    yield Finding(
        "learning_rate_too_low",
        "warning" if slow or linear or facts.times_too_low >= FAR_BELOW else "note",
        f"--learning_rate {short(rate)} was too low, {times(facts.times_too_low)} times below the range for {doing} "
        f"({short(low)} to {short(high)}): the training loss fell from {first:.3f} to {last:.3f}, {how}",
        {"learning_rate": rate, "range": [low, high], "first": first, "last": last, "gain_of_last_quarter": gain},
        f"Set --learning_rate {short(facts.middle_rate or low)}.",
    )


def plateau(facts: Facts) -> Iterator[Finding]:
    """Flat for long, at a rate at which it could have fallen."""
    flat = _flat(facts)
    if flat is None:
        return
    begins, level = flat
    if facts.run.options.get("lr_schedule") == "constant":
        remedy = "Let the rate fall, which usually lowers such a loss further: --lr_schedule cosine --min_lr 0."
    else:
        model = f"--lora_r {2 * int(facts.option('lora_r') or 16)}" if facts.with_lora else "a larger --model"
        remedy = f"It has learnt what it can from this text: end at --max_steps {begins}, or use more text or {model}."
    yield Finding(
        "plateau",
        "note",
        f"the training loss has been flat since step {begins:,}, at {level:.3f}, while the learning rate was high",
        {"from_step": begins, "loss": level, "steps": facts.steps},
        remedy,
    )


def lora_capacity(facts: Facts) -> Iterator[Finding]:
    """Adapters of a small rank that stopped early on, on training and held-out text alike."""
    rank, flat = facts.option("lora_r"), _flat(facts)
    if not facts.with_lora or rank is None or rank > SMALL_RANK or flat is None or not len(facts.val):
        return
    held_out, train = float(facts.val.values[-1]), float(facts.curve.level[-3:].mean())
    if held_out > (1 + CLOSE) * train or max(facts.times_too_low, facts.times_too_high) > 1:
        return
    begins, level = flat
    more = 4 * int(rank)
    alpha = facts.option("lora_alpha")
    scaled = f" --lora_alpha {alpha * more / rank:g}" if alpha else ""
    yield Finding(
        "lora_capacity",
        "note",
        f"adapters of rank {rank:g} learnt nothing more after step {begins:,}: training text stays at {train:.3f} and "
        f"held-out text at {held_out:.3f}, so nothing is learnt by heart and the rank may be what limits them",
        {"lora_r": rank, "from_step": begins, "loss": level, "val_loss": held_out},
        f"Try --lora_r {more}{scaled}, --lora_targets all-linear, or train the whole model (--no_lora).",
    )


def under_training(facts: Facts) -> Iterator[Finding]:
    """Training and held-out loss were both still falling at the end, by enough to be worth more steps."""
    gain = gain_of_last_quarter(facts)
    if gain is None or gain < WORTH_MORE:
        return
    falls_last = facts.run.options.get("lr_schedule") == "wsd"  # whose last fifth always lowers the loss
    yield Finding(
        "under_training",
        "warning" if gain >= WORTH_MUCH_MORE and facts.finished and not falls_last else "note",
        f"the loss was still falling when the run ended at step {facts.steps:,.0f}: by {gain:.1%} in its last quarter"
        f"{_why_cut(facts)}",
        {"gain_of_last_quarter": gain, "steps": facts.steps, "total_steps": facts.total_steps},
        _more_steps(facts),
    )


def stopped_too_soon(facts: Facts) -> Iterator[Finding]:
    """Patience ended while the validation loss had risen less than it had fallen in as many validations before."""
    val, patience = facts.val, facts.option("early_stopping_patience")
    if facts.status != "early_stopped" or not patience or len(val) < 3 or "max_forgetting" in str(_reason(facts)):
        return
    best = int(val.values.argmin())
    since = len(val) - 1 - best
    before = val.values[max(0, best - since)]
    rise, fall = float(val.values[-1] - val.values[best]), float(before - val.values[best])
    if since == 0 or fall < STILL_FALLING * val.values[best] or rise > min(ONLY_JUST * val.values[best], fall / 2):
        return
    yield Finding(
        "stopped_too_soon",
        "warning",
        f"early stopping ended the run at step {facts.steps:,.0f}, when the validation loss stood only "
        f"{rise:.4f} above its best of step {val.step[best]:,.0f}, after it had fallen by {fall:.4f} in as many "
        f"validations before{_rate_left(facts)}",
        {"rise": rise, "fall": fall, "best_step": float(val.step[best]), "patience": patience},
        f"Set --early_stopping_patience {2 * int(patience) + 1}; best/ keeps the best weights in any case.",
    )


def gain_of_last_quarter(facts: Facts) -> float | None:
    """The share by which the loss, of held-out text where there is any, fell in the last quarter of an ended run.

    None where it cannot be told, or where the training loss did not fall.
    """
    val, curve = facts.val, facts.curve
    if not (facts.finished or facts.cut) or facts.status == "early_stopped" or len(curve) < FEW_STRETCHES:
        return None
    if len(val) > 1 and val.values.argmin() < len(val) - 1:
        return None
    if len(val) > 1 and val.step[0] <= 0.75 * facts.steps and val.step[-1] > 0.9 * facts.steps:
        before, now = float(np.interp(0.75 * facts.steps, val.step, val.values)), float(val.values[-1])
        measured = np.any(np.abs(val.step / facts.steps - 0.75) < 0.15)
        fall = (before - now) * (1.0 if measured else STRAIGHT)
        return fall / before if fall > LEAST_NATS else 0.0
    third = round(0.75 * len(curve))
    before, now = float(curve.level[third - 2 : third + 1].mean()), float(curve.level[-2:].mean())
    return (before - now) / before if before - now > 2 * curve.error else None


def _fall_of_second_half(facts: Facts) -> float:
    """The share of the loss's fall that came with the second half of all learning rates added up."""
    rates, curve = facts.rates, facts.curve
    if not len(rates):
        return 0.0
    summed = np.cumsum(rates.values)
    half = float(rates.step[int(np.searchsorted(summed, summed[-1] / 2))])
    middle = float(np.interp(half, curve.step, curve.level))
    first, last = float(curve.level[0]), float(curve.level[-2:].mean())
    return (middle - last) / (first - last) if first > last else 0.0


def _flat(facts: Facts) -> tuple[int, float] | None:
    """From which step on the loss was flat while the rate was high, and where it stood.

    Held-out text must agree where there is any, and the noise must be small enough to see a fall.
    """
    curve, val = facts.curve, facts.val
    if not facts.finished or len(curve) < FEW_STRETCHES:
        return None
    begin = max(facts.peak_step, facts.learning_until / 2)
    fall = _fall_of_held_out(val, begin, facts.learning_until)
    levels = curve.between(begin, facts.learning_until)
    if fall is None and len(levels) >= 6 and curve.error < 2 * FLAT * levels[0]:
        half = len(levels) // 2
        fall = -relative(float(np.mean(levels[half:])), float(np.mean(levels[:half])))
        if len(val) > 1 and _falls(val, begin):
            return None
    return None if fall is None or abs(fall) > FLAT else (round(begin), float(np.mean(levels)))


def _fall_of_held_out(val: Series, begin: float, end: float) -> float | None:
    """By what share the best of held-out text fell over these steps; None where it was measured too seldom."""
    there = val[(val.step > begin) & (val.step <= end)]
    earlier = val[val.step <= begin]
    if len(there) < ENOUGH_VALIDATIONS or not len(earlier):
        return None
    return -relative(there.values.min(), earlier.values.min())


def _falls(val: Series, begin: float) -> bool:
    """Whether the best validation after step `begin` is clearly below the best before it."""
    earlier, later = val.values[val.step <= begin], val.values[val.step > begin]
    return len(earlier) > 0 and len(later) > 0 and bool(later.min() < (1 - FLAT) * earlier.min())


def _more_steps(facts: Facts) -> str:
    epochs, steps, hours = facts.option("epochs"), facts.option("max_steps"), facts.option("max_training_hours")
    if facts.cut:
        if facts.option("stop_at_step"):
            return "The same command without --stop_at_step goes on from here."
        return f"The same command with --max_training_hours {2 * (hours or 12.0):g} goes on from here."
    tokens = facts.option("max_tokens")
    if tokens:
        longer = f"--max_tokens {2 * tokens:g}"
    elif steps and steps <= facts.total_steps:
        longer = f"--max_steps {2 * int(steps)}"
    else:
        longer = f"--epochs {2 * int(epochs or 1)}"
    rate, middle = facts.peak_rate, facts.middle_rate
    faster = f", or --learning_rate {short(middle)}" if rate and middle and rate < middle / 2 else ""
    return f"Set {longer}{faster}."


def _why_cut(facts: Facts) -> str:
    if not facts.cut:
        return ""
    planned = f" at step {facts.steps:,.0f} of {facts.total_steps:,.0f}" if facts.result("total_steps") else ""
    budget = _reason(facts) or "--max_training_hours ended it"
    return f"; its budget cut it off{planned} ({budget})"


def _reason(facts: Facts) -> str:
    """Why it ended early; older runs say it in their notes."""
    return str(facts.run.summary.get("reason") or facts.run.summary.get("notes") or "")


def _rate_left(facts: Facts) -> str:
    """The last fall of a loss comes when the rate falls, which an early stop does not wait for."""
    if len(facts.rates) < FIRST_RECORDS:
        return ""
    left = float(facts.rates.values[-1] / facts.rates.values.max())
    return f"; the learning rate was still {left:.0%} of its peak" if left > 0.3 and math.isfinite(left) else ""
