"""Successive halving (Jamieson & Talwalkar, 2016): at each rung the worse part of the runs goes no further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from seedbed.sweep.plan import PlannedRun
from seedbed.sweep.standing import validation_loss


@dataclass(frozen=True)
class Judgement:
    """Who goes on after a rung, and why the others do not."""

    better: tuple[str, ...]
    stopped: dict[str, str]
    """Reasons by name."""


def judge(runs: Sequence[PlannedRun], folder: Path, rung: int, keep: float) -> Judgement:
    """Compare runs by their validation loss at step `rung`; those that differ only in their seed by its mean.

    Of G settings the best ⌈keep · G⌉ go on. One with a run that failed, or was never validated, does not.
    """
    losses: dict[str, list[float]] = {}
    for run in runs:
        loss = validation_loss(folder / run.name, rung)
        losses.setdefault(run.settings, []).append(math.inf if loss is None else loss)
    means = {settings: fmean(values) for settings, values in losses.items()}
    ranked = sorted(means, key=lambda settings: means[settings])
    going_on = {settings for settings in ranked[: math.ceil(keep * len(ranked))] if math.isfinite(means[settings])}
    stopped = {
        run.name: f"stopped by halving at step {rung}: validation loss {means[run.settings]:.4f}, "
        f"number {ranked.index(run.settings) + 1} of {len(ranked)}"
        for run in runs
        if run.settings not in going_on
    }
    return Judgement(tuple(run.name for run in runs if run.settings in going_on), stopped)
