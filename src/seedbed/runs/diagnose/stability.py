"""Rules about updates that were too large: the learning rate, its warm-up, clipping, numbers that overflow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from seedbed.findings import Finding, Level
from seedbed.runs.diagnose.facts import FIRST_RECORDS, Facts, rows_of, short, times
from seedbed.runs.diagnose.smoothing import CLEAR, deviation, median_error

FEW_STRETCHES = 6  # of five records; below that a curve has no shape
FEW_STEPS = 20  # of which a schedule is of no consequence
JUMPED = 4.0  # deviations of a single loss, by which several of the first steps stand above the first
LASTING = 0.1  # share of the run after the peak that makes a climb more than a spike
FAR_ABOVE = 2.0  # times the top of the range
CLIMBED = 3.0  # standard errors, of several stretches together
STUCK = 0.04  # the share by which a loss falls that does not get anywhere; more where the rate is beyond all doubt
STRANGER = 0.3  # nats by which held-out text is predicted worse than training text that was not yet seen twice
WORSENED = 0.01  # share of its best by which a validation loss has risen
SGD_RATE = 0.1  # that usually goes well, momentum and all
LOSS_SCALING = 30  # steps in which float16 finds its loss scale by overflowing
MUCH_LARGER = 4.0  # gradients that stand out among the first
NEARLY_EVERY = 0.95
BEYOND, FAR_BEYOND = 1.5, 20.0  # times --max_grad_norm


@dataclass(frozen=True)
class Harm:
    """What speaks for updates that were too large."""

    what: str
    evidence: dict[str, Any]
    level: Level = "warning"


def learning_rate_too_high(facts: Facts) -> Iterator[Finding]:
    rate = facts.peak_rate
    harm = _climb(facts)
    if harm is None and facts.times_too_high >= FAR_ABOVE:
        harm = _stuck(facts) or _worse_held_out(facts) or _not_finite(facts)
    if rate is None or harm is None:
        return
    lower = facts.middle_rate if facts.middle_rate and facts.middle_rate < rate / 2 else rate / 3
    yield Finding(
        "learning_rate_too_high",
        harm.level,
        f"--learning_rate {short(rate)} was too high{_beyond(facts)}: {harm.what}",
        {"learning_rate": rate, "range": list(facts.rate_range[1:]) if facts.rate_range else None, **harm.evidence},
        f"Set --learning_rate {short(lower)}{_gentler(facts)}.",
    )


def divergence(facts: Facts) -> Iterator[Finding]:
    """The training loss ends far above its lowest and was still rising, or far above where it began."""
    curve = facts.curve
    if len(curve) < FEW_STRETCHES:
        return
    lowest, last = int(curve.level.argmin()), float(curve.level[-1])
    best = float(curve.level[lowest])
    rising = last >= curve.level[-2] - curve.error and last > curve.level[len(curve) * 3 // 4 - 1]
    beyond = last > 1.1 * facts.first_loss + curve.margin
    if last - best <= max(curve.margin, 0.1 * best) or not (rising or beyond):
        return
    step = int(curve.step[lowest])
    rate = facts.peak_rate
    lower = f"Set --learning_rate {short(rate / 3)}{_gentler(facts)}." if rate else f"Lower it{_gentler(facts)}."
    what = "rises" if rising else f"ends above the {facts.first_loss:.3f} where it began"
    yield Finding(
        "divergence",
        "error",
        f"the training loss {what}: it was {best:.3f} around step {step:,} and is {last:.3f} at step "
        f"{facts.steps:,.0f}; the updates have become larger than the weights can take",
        {"lowest": best, "lowest_step": step, "last": last, "steps": facts.steps, "learning_rate": rate},
        f"{lower}{_weights_before(facts, step)}",
    )


def nan(facts: Facts) -> Iterator[Finding]:
    """Updates that were left out because the loss or its gradient was not finite, or exploded."""
    precision = str(facts.run.summary.get("precision"))
    in_half = precision == "fp16"
    steps = [int(event["step"]) for event in facts.of("skipped_step") if isinstance(event.get("step"), int)]
    harmful = [step for step in steps if not in_half or step > LOSS_SCALING]
    gave_up = facts.status == "diverged"
    if not harmful and not gave_up:
        return
    shown = ", ".join(f"{step:,}" for step in harmful[:5]) + (", ..." if len(harmful) > 5 else "")
    were = "1 update was" if len(harmful) == 1 else f"{len(harmful):,} updates were"
    exploded = sum("exploded" in str(event.get("reason")) for event in facts.of("skipped_step"))
    kind = "not finite" if not exploded else "exploding" if exploded == len(steps) else "not finite or exploding"
    what = f"{were} {kind} and left out (step{'s' if len(harmful) > 1 else ''} {shown})" if harmful else ""
    end = f"the run gave up because update after update was {kind}" if gave_up else ""
    rate = facts.peak_rate
    lower = short(min(rate / 10, facts.middle_rate or SGD_RATE)) if rate else None
    cause = "; float16 overflows above 65,504" if in_half else ""
    cure = "Set --precision bf16, or fp32" if in_half else f"Set --learning_rate {lower}" if lower else "Lower the rate"
    yield Finding(
        "nan",
        "error" if gave_up else "warning",
        "; ".join(part for part in (what, end) if part) + cause,
        {"steps": harmful[:100], "skipped": len(harmful), "precision": precision},
        f"{cure}{_gentler(facts)}.{_same_rows(facts)}{_weights_before(facts, min(harmful, default=0))}",
    )


def no_warmup(facts: Facts) -> Iterator[Finding]:
    """Without a warm-up the first updates are large before AdamW knows how large gradients are."""
    loss, norm = facts.train.values, facts.series["grad_norm"].values if "grad_norm" in facts.series else np.empty(0)
    if facts.peak_step > 1 or len(loss) < 4 * FIRST_RECORDS:
        return
    soon = loss[1 : 1 + max(FIRST_RECORDS, len(loss) // 20)]
    jump = float(np.median(np.sort(soon)[-3:]) - loss[0])
    jumped = jump > max(JUMPED * deviation(loss), 0.05 * loss[0])
    kicked = len(norm) == len(loss) and bool(
        norm[1 : 2 * FIRST_RECORDS].max() > MUCH_LARGER * max(norm[0], np.median(norm))
    )
    if not jumped and not kicked:
        return
    largest = f", the gradient's norm went to {norm[: 2 * FIRST_RECORDS].max():.3g}" if kicked else ""
    went = f"the loss went from {loss[0]:.3f} to {loss[0] + jump:.3f}" if jumped else "there was no warm-up"
    yield Finding(
        "no_warmup",
        "warning" if jumped else "note",
        f"{went} in the first {len(soon)} steps{largest}: without a warm-up they have the full learning rate, before "
        "AdamW knows how large the gradients are",
        {"first_loss": float(loss[0]), "jump": jump, "learning_rate": facts.peak_rate, "steps": len(soon)},
        "Set --warmup_ratio 0.1.",
    )


def long_warmup(facts: Facts) -> Iterator[Finding]:
    """The peak comes after half of the run, so that little is learnt at a rate that teaches."""
    steps, total = facts.option("warmup_steps"), facts.total_steps
    warmup = steps if steps is not None else (facts.option("warmup_ratio") or 0.0) * total
    if not warmup or total < FEW_STEPS or warmup <= total / 2 or not (facts.finished or facts.cut):
        return
    reached = f"its peak at step {warmup:,.0f}" if warmup <= facts.steps else "no peak at all"
    yield Finding(
        "long_warmup",
        "warning",
        f"the learning rate reached {reached} of {total:,.0f}: more than half of the run was warm-up, at rates that "
        "teach little",
        {"warmup_steps": warmup, "total_steps": total, "steps": facts.steps},
        f"Set --warmup_steps {max(1, round(total / 10))}." if steps is not None else "Set --warmup_ratio 0.1.",
    )


def clipping(facts: Facts) -> Iterator[Finding]:
    """Nearly every gradient of the second half was longer than `--max_grad_norm`."""
    limit, norms = facts.option("max_grad_norm"), facts.series.get("grad_norm")
    if not limit or norms is None or len(norms) < 4 * FIRST_RECORDS:
        return
    late = norms.values[len(norms) // 2 :]
    share, usual = float(np.mean(late > limit)), float(np.median(late))
    if share < NEARLY_EVERY or usual < BEYOND * limit:
        return
    sgd = facts.run.options.get("optimizer") == "sgd"
    yield Finding(
        "clipping",
        "warning" if sgd or usual > FAR_BEYOND * limit else "note",
        f"{share:.0%} of the gradients in the second half were clipped: their norm is usually {usual:.3g}, so "
        f"--max_grad_norm {limit:g} scales every step instead of those that are unusual",
        {"share": share, "usual": usual, "max_grad_norm": limit},
        f"Set --max_grad_norm {_rounded_up(float(np.quantile(late, 0.9)))}, or take more rows a step "
        f"(--grad_accumulation {2 * int(facts.option('grad_accumulation') or 1)}).",
    )


# What speaks for too high a rate


def _climb(facts: Facts) -> Harm | None:
    """The loss stands for long above where it stood before the rate reached its peak."""
    curve = facts.curve
    if len(curve) < FEW_STRETCHES:
        return None
    before, error = _before_the_peak(facts)
    margin = max(CLIMBED * np.hypot(curve.error, error), 0.05 * before)
    after = curve.step > facts.peak_step
    high = (curve.level > before + margin) & after
    since = np.flatnonzero(after)
    if high.sum() < max(2, LASTING * after.sum()) or np.flatnonzero(high)[0] > since[len(since) // 2]:
        return None
    stays = bool(high[-1])
    worst, first = float(curve.level[high].max()), int(curve.step[high][0] - curve.records)
    last = float(curve.level[-1])
    until = (
        f"and is still {last:.3f} at step {facts.steps:,.0f}"
        if stays
        else f"and stayed above for {high.sum() / after.sum():.0%} of the steps after it"
    )
    return Harm(
        f"the training loss stood at {before:.3f} before the peak and climbed to {worst:.3f} from step "
        f"{max(1, first):,} on, {until}",
        {"before": before, "highest": worst, "from_step": max(1, first), "last": last},
        "error" if stays else "warning",
    )


def _before_the_peak(facts: Facts) -> tuple[float, float]:
    """Where the loss stood before the rate reached its peak, and the standard error of that.

    The level of the lowest stretch of the warm-up; or the first loss alone, made before any update, if it is lower
    by more than its noise.
    """
    values = facts.train.values
    noise, first = deviation(values), float(values[0])
    warm = values[facts.train.step <= min(facts.peak_step, facts.steps / 2)]
    if len(warm) < FIRST_RECORDS:
        return (first, noise) if first < facts.first_loss - CLEAR * noise else (facts.first_loss, noise / 2)
    records = max(FIRST_RECORDS, min(facts.curve.records, len(warm) // 3))
    parts = np.array_split(warm, len(warm) // records)
    level, error = min(float(np.median(part)) for part in parts), median_error(values, len(parts[0]))
    return (first, noise) if first < level - CLEAR * noise else (level, error)


def _stuck(facts: Facts) -> Harm | None:
    """After the peak the loss hardly fell while the rate was high; that of a pretrained model need not."""
    if facts.pretrained or facts.steps < facts.total_steps / 2:
        return None
    levels = facts.curve.between(max(facts.peak_step, facts.steps / 5), facts.learning_until)
    fall = STUCK * max(1.0, math.log10(facts.times_too_high))
    if len(levels) < FEW_STRETCHES or levels[0] - levels[-3:].mean() > fall * levels[0]:
        return None
    first, last = float(levels[0]), float(levels[-1])
    return Harm(
        f"the training loss stayed between {levels.max():.3f} and {levels.min():.3f} as long as the rate was high",
        {"first": first, "last": last, "until_step": facts.learning_until},
    )


def _worse_held_out(facts: Facts) -> Harm | None:
    """A pretrained model that predicts held-out text worse than new text before, worse and worse, or as a stranger."""
    val = facts.val
    if not facts.pretrained or not len(val) or len(facts.train) < 4 * FIRST_RECORDS:
        return None
    best, first, last = float(val.values.min()), facts.first_loss, float(val.values[-1])
    now = facts.loss_before(val.step[-1], max(FIRST_RECORDS, facts.curve.records))
    ruined, worsening = best > first + 0.02, last > (1 + WORSENED) * best
    stranger = val.epoch[-1] <= 1.01 and last - now > STRANGER
    if not (ruined or worsening or stranger):
        return None
    at_best = f" (at best {best:.3f}, at step {val.step[val.values.argmin()]:,.0f})" if worsening else ""
    return Harm(
        f"held-out text costs {last:.3f} nats a token at step {val.step[-1]:,.0f}{at_best}, training text "
        f"{first:.3f} over the first steps and {now:.3f} now: large updates fit the last batches and undo what "
        "the model knew",
        {"first_loss": first, "loss": now, "best_val_loss": best, "val_loss": last},
    )


def _not_finite(facts: Facts) -> Harm | None:
    skipped = len(facts.of("skipped_step"))
    if facts.status != "diverged" or facts.run.summary.get("precision") == "fp16":
        return None
    return Harm(f"after it {skipped:,} updates were not finite, and the run gave up", {"skipped": skipped}, "error")


# Parts of sentences


def _beyond(facts: Facts) -> str:
    if facts.rate_range is None or facts.times_too_high <= 1:
        return ""
    doing, low, high = facts.rate_range
    return f", {times(facts.times_too_high)} times the top of the range for {doing} ({short(low)} to {short(high)})"


def _gentler(facts: Facts) -> str:
    """What else makes first and large updates smaller, where it is not on."""
    flags = []
    if len(facts.rates) and facts.peak_step <= 1:
        flags.append("--warmup_ratio 0.1")
    if facts.option("max_grad_norm") == 0:
        flags.append("--max_grad_norm 1")
    return f" with {' and '.join(flags)}" if flags else ""


def _weights_before(facts: Facts, step: int) -> str:
    """The checkpoint from before a step, if there is one."""
    best, place = facts.result("best_step"), facts.checkpoint("best")
    return f" The weights of step {best:,.0f}, before it, are in {place}." if place and best and best <= step else ""


def _same_rows(facts: Facts) -> str:
    """Rows that were not finite in more than one epoch are to blame themselves."""
    rows = Counter(filter(None, map(rows_of, facts.of("skipped_step"))))
    again = [pair for pair, count in rows.items() if count > 1]
    return f" Rows {again[0][0]} to {again[0][1]} did it in more than one epoch: look at them." if again else ""


def _rounded_up(value: float) -> str:
    """One digit, upwards: 8.3 becomes 9, 0.031 becomes 0.04."""
    power = 10.0 ** np.floor(np.log10(value))
    return f"{np.ceil(value / power) * power:g}"
