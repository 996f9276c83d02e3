"""Going back to an earlier checkpoint of the run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from seedbed.checkpoint import load_model, newest_intact, read_optimizer, read_state
from seedbed.optim import load_optimizer_tensors
from seedbed.train.job import Job
from seedbed.train.state import TrainingState

MOST_ROLLBACKS: Final = 3
LOWERED: Final = 0.5  # what each of them makes of the learning rate


def go_back(job: Job) -> Path | None:
    """Put weights, optimizer, state and records back to the newest intact checkpoint; None where there is none.

    What the run learnt about itself since stays: time used, rows set aside, smaller micro-batches, lower rates.
    """
    checkpoint, _ = newest_intact(job.run.checkpoints)
    if checkpoint is None:
        return None
    load_weights(job, checkpoint)
    job.optimizer.state.clear()
    load_optimizer_tensors(job.model, job.optimizer, read_optimizer(checkpoint))
    now, then = job.state, TrainingState.from_json(read_state(checkpoint))
    then.rollbacks, then.learning_rate_factor, then.set_aside = now.rollbacks, now.learning_rate_factor, now.set_aside
    then.micro_batch_size, then.seconds = now.micro_batch_size, now.seconds
    now.become(then)
    job.scaler.load_state_dict(now.scaler)
    job.run.truncate({name: length for name, length in now.records.items() if name != "events.jsonl"})
    return checkpoint


@torch.no_grad()
def load_weights(job: Job, checkpoint: Path) -> None:
    """The weights that are trained, from a checkpoint of the same run."""
    saved = dict(load_model(checkpoint)[0].named_parameters())
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved[name])


def lower_and_set_aside(state: TrainingState) -> None:
    """Half the learning rate, and never again the rows of the updates that were refused one after the other."""
    state.rollbacks += 1
    state.learning_rate_factor *= LOWERED
    bad = range(state.step - state.skipped_in_a_row, state.step)
    state.set_aside = sorted({*state.set_aside, *bad})
    state.skipped_in_a_row = 0
