"""The learning rate as a pure function of the step, or of the share of the time budget used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

WSD_DECAY_SHARE = 0.2


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then a fall to `minimum`.

    Steps are counted from 1, so the first update has `peak / warmup_steps`. `total_steps` is None
    when only the clock ends the run (`cosine_time` without a limit on steps).
    """

    kind: Literal["cosine", "cosine_time", "linear", "constant", "wsd"]
    peak: float
    minimum: float
    warmup_steps: int
    warmup_ratio: float
    total_steps: int | None

    def at(self, step: int, budget_used: float = 0.0) -> float:
        """Learning rate of the update number `step`, with `budget_used` (0 to 1) of the hours gone."""
        if self.kind == "cosine_time":
            return self._at_time(step, budget_used)
        assert self.total_steps is not None
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self._after_warmup(min(1.0, progress))

    def _at_time(self, step: int, budget_used: float) -> float:
        """Elapsed time only grows and sums up the noise of single steps, so the curve is smooth."""
        steps_used = step / self.total_steps if self.total_steps else 0.0
        used = min(1.0, max(budget_used, steps_used))
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if used < self.warmup_ratio:
            return self.peak * used / self.warmup_ratio
        return self._after_warmup((used - self.warmup_ratio) / (1 - self.warmup_ratio))

    def _after_warmup(self, progress: float) -> float:
        return self.minimum + (self.peak - self.minimum) * self._height(progress)

    def _height(self, progress: float) -> float:
        match self.kind:
            case "cosine" | "cosine_time":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "linear":
                return 1 - progress
            case "constant":
                return 1.0
            case "wsd":
                return min(1.0, (1 - progress) / WSD_DECAY_SHARE)
