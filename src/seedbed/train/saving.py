"""Checkpoints of a run that goes on: under several names, and on disks that refuse."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from seedbed.checkpoint import link_checkpoint, rotate, save_checkpoint
from seedbed.errors import StorageError
from seedbed.optim import optimizer_tensors
from seedbed.train.job import Job
from seedbed.train.progress import Display
from seedbed.train.step import is_out_of_memory
from seedbed.train.stopping import Stopwatch

PAUSES: Final = (0.0, 0.5, 2.0)  # seconds before each try
MOST_FAILURES: Final = 5  # one after the other


class Saver:
    """Writes a run's checkpoints; a disk that is full or fails for a while does not end the run."""

    def __init__(self, job: Job, display: Display, watch: Stopwatch) -> None:
        self._job, self._display, self._watch = job, display, watch
        trained = (p.numel() * p.element_size() for p in job.model.parameters() if p.requires_grad)
        self.seconds = 0.5 + 3 * sum(trained) / 500e6
        """Of a slow recent save; an estimate until there was one."""
        self.newest: tuple[int, Path] | None = None
        """Step and folder of the weights at hand, if they are on disk."""
        self._failures = 0

    def save_numbered(self, kind: str, number: int) -> Path | None:
        """`KIND-NUMBER`, and none of its kind beyond those that are kept; see `save`."""
        folder = self.save(f"{kind}-{number}")
        if folder:
            rotate(self._job.run.checkpoints, kind, self._job.watching.keep_checkpoints)
        return folder

    def save_best(self) -> None:
        """The weights as the best, which they are only once they are on disk."""
        state = self._job.state
        before = state.best_val_loss, state.best_step
        state.best_val_loss, state.best_step = state.val_loss, state.step
        if self.save("best") is None:
            state.best_val_loss, state.best_step = before

    def save(self, name: str, *, last: bool = False) -> Path | None:
        """Save under `name`, with a few tries; None where the disk refuses and the run goes on without.

        Raises:
            StorageError: it refuses the last checkpoint of a run, or several one after the other.
        """
        for pause in PAUSES:
            time.sleep(pause)
            try:
                folder = self._write(name)
            except (StorageError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                failure = error
            else:
                self._failures = 0
                return folder
        self._failures += 1
        run, step = self._job.run, self._job.state.step
        refused = failure if isinstance(failure, StorageError) else StorageError(f"{run.path}: {failure}")
        if last or self._failures >= MOST_FAILURES:
            raise refused
        run.event("save_failed", step, checkpoint=name, reason=str(refused))
        self._display.line(f"Step {step}: {refused}. Going on; earlier checkpoints are whole")
        return None

    def _write(self, name: str) -> Path:
        """Another name for the weights just saved costs next to nothing."""
        job, state = self._job, self._job.state
        folder = job.run.checkpoints / name
        state.seconds = began = self._watch.seconds
        state.scaler = job.scaler.state_dict()
        state.records = job.run.positions()
        if self.newest and self.newest[0] == state.step and self.newest[1].exists() and self.newest[1] != folder:
            link_checkpoint(self.newest[1], folder, state.to_json())
            return folder
        tensors = optimizer_tensors(job.model, job.optimizer)
        save_checkpoint(folder, job.model, job.tokenizer, tensors, state.to_json(), job.keeping.companions)
        self.seconds = max(self._watch.seconds - began, 0.9 * self.seconds)
        self.newest = (state.step, folder)
        return folder
