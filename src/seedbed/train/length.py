"""How long a run is, in steps, and how its learning rate goes."""

from __future__ import annotations

import math

from seedbed.config import Config, TrainingOptions
from seedbed.data.rows import Rows
from seedbed.schedule import Schedule


def length(config: Config, rows: Rows) -> tuple[int | None, int | None]:
    """Epochs and steps of the run; None where only the clock ends it.

    A regime's number of epochs gives way to a limit the user chose: steps, tokens, or hours with `cosine_time`.
    """
    training, limit = config.training, step_limit(config.training, rows)
    if (limit is not None or training.lr_schedule == "cosine_time") and not config.is_given("epochs"):
        return None, limit
    steps = training.epochs * steps_per_epoch(training, rows)
    return training.epochs, min(steps, limit or steps)


def steps_per_epoch(training: TrainingOptions, rows: Rows) -> int:
    return math.ceil(len(rows) / training.rows_per_step)


def step_limit(training: TrainingOptions, rows: Rows) -> int | None:
    """The steps that `max_steps` and `max_tokens` leave, whichever are fewer; a step has its mean number of tokens."""
    limits = [] if training.max_steps is None else [training.max_steps]
    if training.max_tokens is not None:
        limits.append(math.ceil(training.max_tokens * steps_per_epoch(training, rows) / rows.num_targets))
    return min(limits, default=None)


def make_schedule(options: TrainingOptions, total_steps: int | None) -> Schedule:
    """The learning rate's way; a floor that was not chosen never stands above the peak."""
    by_time = options.lr_schedule == "cosine_time"
    ratio = options.warmup_ratio or 0.0
    steps = options.warmup_steps
    if steps is None:
        steps = 0 if by_time else round(ratio * (total_steps or 0))
    return Schedule(
        kind=options.lr_schedule,
        peak=options.learning_rate,
        minimum=min(options.min_lr, options.learning_rate),
        warmup_steps=steps,
        warmup_ratio=ratio if by_time else 0.0,
        total_steps=total_steps,
    )
