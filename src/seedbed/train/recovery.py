"""What a run does about bad numbers and too little memory: skip, take fewer rows at once, go back."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from seedbed import distributed, parallel
from seedbed.checkpoint import load_model, newest_intact, read_optimizer, read_state
from seedbed.errors import CheckpointError, DivergedError, OutOfMemoryError
from seedbed.optim import load_optimizer_tensors
from seedbed.train.job import Job
from seedbed.train.progress import Display
from seedbed.train.saving import Saver
from seedbed.train.state import TrainingState
from seedbed.train.step import let_go

MOST_REFUSED: Final = 10  # updates, one after the other
MOST_ROLLBACKS: Final = 3
LOWERED: Final = 0.5  # what each of them makes of the learning rate


class Recovery:
    """Keeps a run going; everything it does is an event and a line.

    Args:
        went_back: called whenever the run continues from an earlier checkpoint.
    """

    def __init__(self, job: Job, display: Display, saver: Saver, went_back: Callable[[], None]) -> None:
        self._job, self._display, self._saver, self._went_back = job, display, saver, went_back

    def take_fewer_rows(self, during: str) -> None:
        """Halve the rows at once; the update, its rows and their order stay the same.

        Raises:
            OutOfMemoryError: it was one row already; or other processes are in the middle of a step with this one.
        """
        job, state = self._job, self._job.state
        let_go(job)
        if distributed.size() > 1:
            raise OutOfMemoryError(
                f"process {distributed.rank()}, {job.device}: out of memory with {job.micro_batch_size} rows at a "
                f"time; go on with --batch_size {max(1, job.micro_batch_size // 2)} and --grad_accumulation "
                f"{2 * job.training.grad_accumulation}, in a run of its own"
            )
        if job.micro_batch_size == 1:
            raise OutOfMemoryError(nothing_fits(job))
        state.micro_batch_size = -(-job.micro_batch_size // 2)
        job.run.event("out_of_memory", state.step + 1, during=during, micro_batch_size=state.micro_batch_size)
        self._display.line(
            f"Step {state.step + 1}: out of memory; going on with {state.micro_batch_size} rows at once, "
            f"{job.training.rows_per_step} an update as before"
        )

    def do_without_sample(self) -> None:
        """Go on without what the model would have written.

        Raises:
            OutOfMemoryError: other processes write it together with this one.
        """
        job, state = self._job, self._job.state
        if parallel.is_sharded(job.model):
            raise OutOfMemoryError(
                f"process {distributed.rank()}, {job.device}: out of memory while a sample was written; free some, "
                "and the same command goes on"
            )
        job.run.event("out_of_memory", state.step, during="writing")
        self._display.line(f"Step {state.step}: out of memory; no sample this time")

    def undo_torn_update(self) -> None:
        """Back to the last checkpoint, since the weights are neither of one step nor of the next.

        Raises:
            OutOfMemoryError: there is none yet.
        """
        job, torn_at = self._job, self._job.state.step
        if self._go_back() is None:
            raise OutOfMemoryError(f"{nothing_fits(job)} (in the middle of an update, with no checkpoint yet)")
        job.run.event("roll_back", torn_at, to=job.state.step, reason="out of memory in the middle of an update")

    def pass_over(self) -> None:
        """Leave out the rows of a step that were set aside."""
        job, state = self._job, self._job.state
        first, end = job.rows_of(state.step)
        state.step += 1
        job.run.event("set_aside", state.step, rows=[first, end - 1])

    def skip(self, reason: str) -> None:
        """Record an update that was refused; after several in a row go back, lower the rate and set them aside.

        Raises:
            DivergedError: nothing was learnt yet, or going back did not help.
        """
        job, state = self._job, self._job.state
        state.skipped_in_a_row += 1
        first, end = job.rows_of(state.step - 1)
        job.run.event("skipped_step", state.step, reason=reason, rows=[first, end - 1])
        self._display.line(f"Step {state.step}: {reason}; update skipped")
        # float16 finds its loss scale by overflowing: from 65,536 down takes some tries.
        limit = 2 * MOST_REFUSED if job.scaler.is_enabled() else MOST_REFUSED
        if state.skipped_in_a_row >= limit:
            self._roll_back(f"{limit} updates in a row were refused ({reason})")

    def _roll_back(self, reason: str) -> None:
        job, state = self._job, self._job.state
        bad_at = state.step
        if not state.tokens or state.rollbacks >= MOST_ROLLBACKS:
            tried = f", also after going back {state.rollbacks} times with lower rates" if state.rollbacks else ""
            raise DivergedError(
                f"step {bad_at}: {reason}{tried}; lower --learning_rate "
                f"(now {job.training.learning_rate * state.learning_rate_factor:g}) or lengthen --warmup_steps"
            )
        state.rollbacks += 1
        state.learning_rate_factor *= LOWERED
        state.set_aside = sorted({*state.set_aside, *range(bad_at - state.skipped_in_a_row, bad_at)})
        state.skipped_in_a_row = 0
        if state.tokens == state.tokens_at_rollback:  # nothing was learnt since: the rows are not what is bad
            distributed.on_first(lambda: remove_doubtful(job.run.checkpoints))
        checkpoint, factor = self._go_back(), state.learning_rate_factor
        state.tokens_at_rollback = state.tokens
        job.run.event(
            "roll_back",
            bad_at,
            to=state.step,
            reason=reason,
            checkpoint=None if checkpoint is None else checkpoint.name,
            learning_rate_factor=factor,
            set_aside=state.set_aside,
        )
        where = f"back to {checkpoint}" if checkpoint else "on from the weights at hand, which no bad update reached"
        self._display.line(
            f"Step {bad_at}: {reason}; {where}, with {factor:g} times the learning rate and without their rows"
        )

    def _go_back(self) -> Path | None:
        self._saver.wait()
        checkpoint = go_back(self._job)
        if checkpoint is not None:
            self._saver.newest = (self._job.state.step, checkpoint)
            self._went_back()
        return checkpoint


def go_back(job: Job) -> Path | None:
    """Put weights, optimizer, state and records back to the newest intact checkpoint; None where there is none.

    What the run learnt about itself since stays: time used, rows set aside, smaller micro-batches, lower rates.
    """
    found = distributed.on_first(lambda: _name_of_newest(job))
    if found is None:
        return None
    checkpoint = job.run.checkpoints / found
    with distributed.weights_in_first_only(parallel.is_sharded(job.model)):
        saved = load_model(checkpoint)[0]
    parallel.load(job.model, saved)
    job.optimizer.state.clear()
    load_optimizer_tensors(job.model, job.optimizer, read_optimizer(checkpoint))
    now, then = job.state, TrainingState.from_json(read_state(checkpoint))
    then.rollbacks, then.learning_rate_factor, then.set_aside = now.rollbacks, now.learning_rate_factor, now.set_aside
    then.micro_batch_size, then.seconds = now.micro_batch_size, now.seconds
    then.tokens_at_rollback = now.tokens_at_rollback
    now.become(then)
    if now.scaler:  # none of a run in other precision
        job.scaler.load_state_dict(now.scaler)
    job.run.truncate({name: length for name, length in now.records.items() if name != "events.jsonl"})
    return checkpoint


def _name_of_newest(job: Job) -> str | None:
    checkpoint, _ = newest_intact(job.run.checkpoints)
    return None if checkpoint is None else checkpoint.name


def remove_doubtful(checkpoints: Path) -> None:
    """Delete the checkpoints that were saved while updates were refused: their weights may be why."""
    for folder in checkpoints.iterdir():
        with contextlib.suppress(CheckpointError):
            if read_state(folder).get("skipped_in_a_row"):
                shutil.rmtree(folder)


def nothing_fits(job: Job) -> str:
    """That not even one row fits, and what would take less."""
    training, length = job.training, job.rows.max_seq_len
    helps = {
        "--gradient_checkpointing": not training.gradient_checkpointing,
        f"--max_seq_len {length // 2}": length > 1,
        "--optimizer adamw8bit": training.optimizer == "adamw",
        "--lora": job.model.adapter is None and job.parent is not None,
    }
    listed = ", ".join(option for option, useful in helps.items() if useful)
    return (
        f"{job.device}: out of memory with one row of {length} tokens at a time; "
        f"what takes less: {listed or 'a smaller model'}. `seedbed plan` says how much"
    )
