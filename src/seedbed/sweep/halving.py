"""Successive halving (Jamieson & Talwalkar, 2016): at each rung the worse part of the runs goes no further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from seedbed.runs.folder import read_summary
from seedbed.sweep.plan import PlannedRun
from seedbed.sweep.standing import has_ended, has_reached, validation_loss


@dataclass(frozen=True)
class Judgement:
    """Who goes on after a rung, and why the others do not."""

    better: tuple[str, ...]
    stopped: dict[str, str]
    """Reasons by name."""


def judge(runs: Sequence[PlannedRun], folder: Path, rung: int, keep: float) -> Judgement:
    """Compare runs by their validation loss at step `rung`; those that differ only in their seed by its mean.

    Of G settings the best ⌈keep · G⌉ go on. One with a run that broke off before, or was never validated, does not.
    """
    losses: dict[str, list[float]] = {}
    for run in runs:
        losses.setdefault(run.settings, []).append(_loss(run, folder / run.name, rung))
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


def _loss(run: PlannedRun, path: Path, rung: int) -> float:
    """The validation loss of a run that came to the rung, or to its own end before it; else infinity."""
    ended = has_ended(path, run) and read_summary(path)["status"] != "diverged"
    loss = validation_loss(path, rung) if ended or has_reached(path, rung) else None
    return math.inf if loss is None else loss
