"""Means over questions, and how far they can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final, Literal

import numpy as np

from seedbed.judge.prompts import Verdict

RESAMPLES: Final = 10_000
LEVEL: Final = 0.95
AT_ONCE: Final = 2**22  # numbers drawn at once, which bounds the memory

Outcome = Literal["win", "loss", "tie"]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its interval of 95 %; the bounds are None for a single question."""

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float], seed: int = 0) -> Estimate | None:
    """The mean of one value a question, with its percentile bootstrap interval (Efron, 1979); None without values.

    10,000 samples of as many questions, drawn with replacement. Values that are differences between two models on the
    same questions give a paired interval.
    """
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None)
    data, rng = np.array(values), np.random.default_rng(seed)
    size = max(1, AT_ONCE // len(data))
    counts = [min(size, RESAMPLES - done) for done in range(0, RESAMPLES, size)]
    means = np.concatenate([data[rng.integers(len(data), size=(count, len(data)))].mean(1) for count in counts])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))


def differences(scores: Mapping[str, float], others: Mapping[str, float]) -> list[float]:
    """First minus second, on each question that both have a score for."""
    return [score - others[question] for question, score in scores.items() if question in others]


def spread(repeats: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation of the scores that one answer gets, averaged over the answers that were scored repeatedly."""
    deviations = [stdev(scores) for scores in repeats if len(scores) > 1]
    return fmean(deviations) if deviations else None


def outcome(first: Verdict, swapped: Verdict) -> Outcome:
    """Of A against B: a preference counts when it holds with A shown first and with A shown second, where it is `B`.

    So a judge that likes a position more than an answer gives ties (Zheng et al., 2023).
    """
    if (first, swapped) == ("A", "B"):
        return "win"
    return "loss" if (first, swapped) == ("B", "A") else "tie"


def is_inconsistent(first: Verdict, swapped: Verdict) -> bool:
    """Whether the verdict changed with the order."""
    return (first, swapped) not in (("A", "B"), ("B", "A"), ("tie", "tie"))
