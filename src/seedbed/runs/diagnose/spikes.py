"""Losses that jump for a step or a few: which there were, and what did it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from seedbed.findings import Finding, Level
from seedbed.runs.diagnose.facts import Facts, number, rows_of, short
from seedbed.runs.noise import robust_deviation
from seedbed.runs.series import Floats

WINDOW = 30  # steps before that say what is usual
DEVIATIONS = 8.0
LEAST_RISE = 0.25  # of what is usual
NEIGHBOURS = 4
APART = 10  # steps between two spikes
NEAR_PEAK = 0.04  # of the run
FEW_ROWS = 0.5  # share of the loss that a few rows hold
MANY_ROWS = 6  # of which the worst three are few
SOON = 100  # steps
RECOVERY = 0.02  # of the run, in which a harmless spike is over
HALF = 0.5  # of a spike: what a cause must explain of it


@dataclass(frozen=True)
class Spike:
    step: float
    loss: float
    usual: float
    """The median of the steps before."""
    times: float
    """Robust deviations above it."""
    lasted: float
    """Steps until the loss was back half-way to what was usual; endless where it never was."""
    event: Mapping[str, Any]
    """What the run recorded about it, if it did."""

    @property
    def height(self) -> float:
        return self.loss - self.usual


def loss_spike(facts: Facts) -> Iterator[Finding]:
    spikes = find_spikes(facts)
    if not spikes:
        return
    worst = max(spikes, key=lambda spike: (spike.lasted > _harmless(facts), spike.height))
    cause, words, remedy = _cause(facts, worst)
    lasting = worst.lasted > _harmless(facts)
    level: Level = "warning" if lasting or cause == "precision" else "note"
    others = f" ({len(spikes)} spikes in all, this one the largest)" if len(spikes) > 1 else ""
    how_long = f"stayed up for {worst.lasted:,.0f} steps" if np.isfinite(worst.lasted) else "did not come back"
    yield Finding(
        "loss_spike",
        level,
        f"at step {worst.step:,.0f} the loss jumped to {worst.loss:.3f}, where {worst.usual:.3f} was usual, and "
        f"{how_long if lasting else 'was back at once'}{others}; {words}",
        {
            "steps": [spike.step for spike in spikes[:100]],
            "loss": worst.loss,
            "usual": worst.usual,
            "times": worst.times,
            "lasted": worst.lasted if np.isfinite(worst.lasted) else None,
            "cause": cause,
        },
        remedy if level == "warning" else f"It needs nothing done. Should it come more often: {remedy}",
    )


def find_spikes(facts: Facts) -> list[Spike]:
    """The run's own events; of older runs, what their losses show."""
    events = [event for event in facts.of("loss_spike") if number(event, "step") is not None]
    if events:
        found = [(number(event, "step"), event) for event in events]
        return [spike for step, event in found if step is not None and (spike := _of_event(facts, step, event))]
    values = facts.train.values
    if len(values) < 2 * WINDOW:
        return []
    usual = np.median(sliding_window_view(values, WINDOW)[:-1], axis=1)  # (N - WINDOW,)
    above, scale = values[WINDOW:] - usual, _scale(values)
    high = np.flatnonzero((above > DEVIATIONS * scale) & (above > LEAST_RISE * usual))
    apart = high[np.diff(high, prepend=-APART) >= APART]
    return [
        Spike(
            step=float(facts.train.step[place + WINDOW]),
            loss=float(values[place + WINDOW]),
            usual=float(usual[place]),
            times=float(above[place] / max(scale, 1e-9)),
            lasted=_lasted(facts, float(facts.train.step[place + WINDOW]), float(values[place + WINDOW]), usual[place]),
            event={},
        )
        for place in apart
    ]


def _scale(values: Floats) -> float:
    """Robust deviation of a loss from its neighbours; where bad batches are usual, that of the tail that they make.

    Neighbours on both sides, so that a loss that stays up for long is no noise.
    """
    off = values[NEIGHBOURS:-NEIGHBOURS] - np.median(sliding_window_view(values, 2 * NEIGHBOURS + 1), axis=1)
    return max(
        robust_deviation(off, 0.0), float(np.quantile(off, 0.97)) / 1.88
    )  # what 97 % of a normal distribution are below


def _of_event(facts: Facts, step: float, event: Mapping[str, Any]) -> Spike | None:
    loss, usual = number(event, "loss"), number(event, "usual")
    if loss is None or usual is None:
        return None
    return Spike(step, loss, usual, number(event, "times") or 0.0, _lasted(facts, step, loss, usual), event)


def _lasted(facts: Facts, step: float, loss: float, usual: float) -> float:
    """Steps until the median of five losses is back half-way; as many as there are, if they are too few to tell."""
    first = int(np.searchsorted(facts.train.step, step, side="right"))
    losses = facts.train.values[first:]
    if len(losses) < 5:
        return float(len(losses))
    for near in (SOON, len(losses)):  # most are over soon, and a long run may have hundreds
        smooth = np.median(sliding_window_view(losses[:near], 5), axis=1)
        back = np.flatnonzero(smooth < usual + HALF * (loss - usual))
        if len(back):
            return float(back[0])
    return float("inf")


def _harmless(facts: Facts) -> float:
    return max(5.0, RECOVERY * facts.steps)


def _cause(facts: Facts, spike: Spike) -> tuple[str, str, str]:
    """A name for what did it, in words, and what to do."""
    event = spike.event
    again, exact = number(event, "again_loss"), number(event, "float32_loss")
    if again is not None and exact is not None and again - exact > HALF * spike.height:
        precision = facts.run.summary.get("precision", "low precision")
        words = f"the same rows cost {exact:.3f} in float32 and {again:.3f} in {precision}, so the precision did it"
        return "precision", words, "Set --precision fp32."
    lasting = spike.lasted > _harmless(facts)
    at_peak = facts.peak_step > 1 and abs(spike.step - facts.peak_step) <= max(3, NEAR_PEAK * facts.total_steps)
    if at_peak and (lasting or not _hard_rows(event, spike)):
        return "peak", _at_peak(facts, spike), _gentler_peak(facts)
    if _hard_rows(event, spike):
        return (
            "batch",
            _in_rows(event, again),
            "Look at these rows, and shorten, mend or leave out what is odd in them.",
        )
    clip = "" if facts.option("max_grad_norm") else " with --max_grad_norm 1"
    rate = facts.peak_rate
    remedy = f"Set --learning_rate {short(rate / 2)}{clip}." if rate else f"Lower the rate{clip}."
    if lasting:
        return "updates", "the steps after it stayed high too, so the weights had moved too far", remedy
    return "unknown", "the next steps were as usual, so the batch is the likely cause", "Take more rows a step."


def _hard_rows(event: Mapping[str, Any], spike: Spike) -> bool:
    """A few rows hold most of the loss, or all of them are still as hard after the update."""
    share, again = number(event, "worst_share"), number(event, "again_loss")
    rows = rows_of(event)
    many = rows is None or rows[1] - rows[0] >= MANY_ROWS
    concentrated = share is not None and share > FEW_ROWS and many
    return concentrated or (again is not None and again > spike.usual + HALF * spike.height)


def _in_rows(event: Mapping[str, Any], again: float | None) -> str:
    rows = event.get("worst_rows")
    worst = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    named = ", ".join(
        f"row {row.get('row')} ({row.get('tokens')} tokens of {number(row, 'loss') or 0:.2f} nats)" for row in worst[:3]
    )
    share = number(event, "worst_share")
    hold = f", which hold {share:.0%} of its loss" if share is not None else ""
    still = f" (the same rows still cost {again:.3f} after the update)" if again is not None else ""
    padding, longest = number(event, "padding"), number(event, "max_length")
    places = f"; its longest row has {longest:,.0f} tokens" if longest else ""
    places += f" and {padding:.0%} of its places were padding" if padding else ""
    return f"one batch did it{still}: {named or 'its rows'}{hold}{places}"


def _at_peak(facts: Facts, spike: Spike) -> str:
    rate = number(spike.event, "peak_learning_rate") or facts.peak_rate
    value = f" ({short(rate)})" if rate else ""
    return (
        f"the schedule reached its peak{value} at step {facts.peak_step:,.0f}, and that is when the weights moved most"
    )


def _gentler_peak(facts: Facts) -> str:
    ratio = min(0.5, max(0.1, 2 * facts.peak_step / max(1.0, facts.total_steps)))
    lower = f"--learning_rate {short(facts.peak_rate / 2)} or " if facts.peak_rate else ""
    return f"Set {lower}--warmup_ratio {ratio:.2g}."
