"""Which updates may reach the weights: none that is not finite, and none that explodes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Final

from seedbed.runs.noise import robust_deviation

WINDOW: Final = 64  # updates before that say what is usual
ENOUGH: Final = 20  # of them, before anything explodes
DEVIATIONS: Final = 12.0  # robust standard deviations above the median
LOSS_RISE: Final = (1.0, 2.0)  # times the median, and nats: a text learnt by heart may meet a hard row
NORM_RISE: Final = 99.0  # times the median


class Guard:
    """What the last updates that were taken were like; those that were refused leave no trace.

    Were a refused loss remembered, it would widen what is usual, and one that is no number would do so for ever.
    """

    def __init__(self, losses: Iterable[float] = (), norms: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW)
        self._norms = deque(norms, maxlen=WINDOW)

    def objection(self, loss: float, grad_norm: float) -> str:
        """Why an update must not be taken, by its loss in nats and the norm of its gradient; empty if it may."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "non-finite loss or gradient"
        times, nats = LOSS_RISE
        if limit := _limit(self._losses, times, nats):
            usual, most = limit
            if loss > most:
                return f"the loss exploded: {loss:.4g}, usual {usual:.4g}"
        if limit := _limit(self._norms, NORM_RISE, 0.0):
            usual, most = limit
            if grad_norm > most:
                return f"the gradient exploded: norm {grad_norm:.4g}, usual {usual:.4g}"
        return ""

    def taken(self, loss: float, grad_norm: float) -> None:
        """Remember an update."""
        self._losses.append(loss)
        self._norms.append(grad_norm)


def _limit(values: deque[float], times: float, least: float) -> tuple[float, float] | None:
    """What is usual, and the most that is still let through."""
    if len(values) < ENOUGH:
        return None
    middle = median(values)
    return middle, middle + max(DEVIATIONS * robust_deviation(values, middle), times * middle, least)
