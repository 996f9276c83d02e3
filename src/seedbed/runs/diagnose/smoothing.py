"""Noisy curves as a few robust levels: medians, and how sure they are.

K: stretches
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from seedbed.runs.noise import robust_deviation
from seedbed.runs.series import Floats, Series

MOST_STRETCHES = 20
LEAST_RECORDS = 5  # in a stretch
MEDIAN_TO_MEAN = 1.2533  # standard error of a median in those of a mean, of a normal distribution
CLEAR = 4.0  # standard errors by which two levels must differ


@dataclass(frozen=True)
class SmoothedCurve:
    """Medians of a series over stretches of equally many records; nothing can be said where these are few."""

    step: Floats
    """(K,) the last step of each stretch."""
    level: Floats
    """(K,) medians over tokens, so that steps of few tokens count little."""
    error: float
    """Standard error of a level: from one record to the next, and from one stretch to the next."""
    records: int
    """In one stretch."""

    def __len__(self) -> int:
        return len(self.level)

    @property
    def margin(self) -> float:
        """What two levels must differ by to differ clearly."""
        return CLEAR * self.error

    def between(self, first: float, last: float) -> Floats:
        """The levels of the stretches that end after step `first` and at the latest at step `last`."""
        return self.level[(self.step > first) & (self.step <= last)]


def smoothed(series: Series) -> SmoothedCurve:
    """The levels of a series, of at least five records each."""
    stretches = min(MOST_STRETCHES, len(series) // LEAST_RECORDS)
    if not stretches:
        return SmoothedCurve(np.empty(0), np.empty(0), 0.0, 0)
    parts = np.array_split(np.arange(len(series)), stretches)
    ends = np.array([part[-1] for part in parts])  # (K,)
    level = np.array([median(series[part]) for part in parts])  # (K,)
    records = len(parts[-1])
    error = max(median_error(series.values, records), _unevenness(level))
    return SmoothedCurve(series.step[ends], level, error, records)


def median(series: Series) -> float:
    """The value that half of the series' tokens were learnt below.

    Where a few long rows hold most of the text, the batches without them are no other kind of step, only small ones.
    """
    tokens = np.diff(series.tokens, prepend=0.0)
    tokens[0] = np.median(tokens)  # a part of a run does not begin at its first token
    if not (tokens > 0).all():
        return float(np.median(series.values))
    order = np.argsort(series.values)
    summed = np.cumsum(tokens[order])
    return float(series.values[order][np.searchsorted(summed, summed[-1] / 2)])


def relative(now: float, before: float) -> float:
    """The change as a share of what was before; none where that is nothing."""
    return float(now / before - 1) if before > 0 else 0.0


def deviation(values: Floats) -> float:
    """Robust standard deviation from one value to the next, in which a trend has no part."""
    if len(values) < 3:
        return 0.0
    change = np.diff(values)
    return robust_deviation(change, float(np.median(change))) / math.sqrt(2)


def median_error(values: Floats, count: int) -> float:
    """Standard error of the median of `count` values that scatter as these do."""
    return MEDIAN_TO_MEAN * deviation(values) / math.sqrt(max(1, count))


def _unevenness(level: Floats) -> float:
    """How far levels stand off a line through their neighbours: what the order of the data adds to the noise."""
    if len(level) < 5:
        return 0.0
    bend = np.diff(level, n=2)
    return robust_deviation(bend, 0.0) / math.sqrt(6)
