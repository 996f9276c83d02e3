"""How far figures scatter, outliers aside; and whether two means over seeds differ by more than luck."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import ArrayLike

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
SLICES = 256  # Simpson's rule over a quarter turn; even


def robust_deviation(values: ArrayLike, middle: float) -> float:
    """The median absolute deviation (MAD) of `values` (N,) from `middle`, as a standard deviation.

    >>> round(robust_deviation([1.0, 2.0, 3.0, 4.0, 1e9], 3.0), 4)
    1.4826
    """
    return float(MAD_TO_DEVIATION * np.median(np.abs(np.asarray(values) - middle)))


@dataclass(frozen=True)
class Difference:
    """The mean of one sample less the mean of another."""

    mean: float
    half_width: float | None
    """Of its 95 % interval; None where neither sample tells how much seeds matter."""

    @property
    def exceeds_noise(self) -> bool | None:
        """Whether zero is outside the interval; None where there is none."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Welch's 95 % interval for the difference of two means; each sample has one value a seed, at least one.

    Where one sample has a single value, its deviation is taken to be the other's. Welch (1947), "The generalization of
    Student's problem when several different population variances are involved".
    """
    mean = fmean(first) - fmean(second)
    samples = [sample for sample in (first, second) if len(sample) > 1]
    if not samples:
        return Difference(mean, None)
    if len(samples) == 1:
        error = stdev(samples[0]) * math.sqrt(1 / len(first) + 1 / len(second))
        return Difference(mean, t_quantile(len(samples[0]) - 1) * error)
    shares = [stdev(sample) ** 2 / len(sample) for sample in samples]
    if not sum(shares):
        return Difference(mean, 0.0)
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(sample) - 1) for share, sample in zip(shares, samples, strict=True)
    )
    return Difference(mean, t_quantile(freedom) * math.sqrt(sum(shares)))


def t_quantile(freedom: float) -> float:
    """The t that Student's distribution of `freedom` >= 1 degrees stays below with 97.5 % probability.

    With t = sqrt(freedom) tan(a), the probability of |T| < t is the integral of cos(x) ** (freedom - 1) from 0 to a,
    as a share of that from 0 to a quarter turn, whose value the gamma function gives. Bisection finds a.

    >>> round(t_quantile(1), 3), round(t_quantile(4), 3), round(t_quantile(1000), 3)
    (12.706, 2.776, 1.962)
    """
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    low, high = 0.0, math.pi / 2
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _integral(middle, freedom - 1) < 0.95 * whole else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _integral(angle: float, power: float) -> float:
    """Of cos(x) ** power from 0 to `angle`, by Simpson's rule."""
    width = angle / SLICES
    weights = (1 if place in (0, SLICES) else 4 if place % 2 else 2 for place in range(SLICES + 1))
    heights: Iterator[float] = (math.cos(place * width) ** power for place in range(SLICES + 1))
    return width / 3 * sum(weight * height for weight, height in zip(weights, heights, strict=True))
