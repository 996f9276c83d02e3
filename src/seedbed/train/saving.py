"""Checkpoints of a run that goes on: under several names, beside training, and on disks that refuse."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final

from torch import Tensor, nn

from seedbed import distributed
from seedbed.checkpoint import link_checkpoint, rotate, save_checkpoint, save_optimizer_part
from seedbed.data.streaming import StreamedRows
from seedbed.device import empty_cache, is_out_of_memory
from seedbed.errors import OutOfMemoryError, SeedbedError, StorageError
from seedbed.model.decoder import Decoder
from seedbed.optim import optimizer_tensors
from seedbed.parallel import gathered, is_sharded, reshard
from seedbed.train.job import Job
from seedbed.train.progress import Display
from seedbed.train.stopping import Stopwatch

PAUSES: Final = (0.0, 0.5, 2.0)  # seconds before each try
MOST_FAILURES: Final = 5  # one after the other

Action = Callable[[], None]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from."""

    model: Decoder
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]

    def copied(self) -> Snapshot:
        """The same in memory of its own, on the CPU, which training does not change."""
        parameters = {
            id(parameter): nn.Parameter(parameter.detach().to("cpu", copy=True))
            if parameter.requires_grad
            else parameter
            for parameter in self.model.parameters()
        }
        optimizer = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.optimizer.items()}
        return Snapshot(copy.deepcopy(self.model, dict(parameters)), optimizer, self.state)


class Saver:
    """Writes a run's checkpoints; a disk that is full or fails for a while does not end the run.

    With `--async_save` one checkpoint at a time is written beside training, from a copy in memory. What comes next
    waits for it: another save, going back, the end.

    Of several processes the first writes, while the others wait; of a model they share, each writes its part of the
    optimizer.
    """

    def __init__(self, job: Job, display: Display, watch: Stopwatch) -> None:
        self._job, self._display, self._watch = job, display, watch
        trained = (p.numel() * p.element_size() for p in job.model.parameters() if p.requires_grad)
        self.seconds = 0.5 + 3 * sum(trained) / 500e6
        """Of a slow recent save; an estimate until there was one."""
        self.newest: tuple[int, Path] | None = None
        """Step and folder of the newest checkpoint, on disk or being written."""
        self._failures = 0
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._about: tuple[int, str, Action] = (0, "", lambda: None)  # step and name; what to do if it fails

    def save_numbered(self, kind: str, number: int) -> Path | None:
        """`KIND-NUMBER`, and none of its kind beyond those that are kept; see `save`.

        While updates are refused all are kept: the current weights may be why.
        """
        checkpoints, keep = self._job.run.checkpoints, self._job.watching.keep_checkpoints
        keep = 0 if self._job.state.skipped_in_a_row else keep
        return self.save(f"{kind}-{number}", then=lambda: rotate(checkpoints, kind, keep))

    def save_best(self) -> None:
        """The weights as the best, which they are only once they are on disk."""
        state = self._job.state
        before = state.best_val_loss, state.best_step

        def undo() -> None:
            state.best_val_loss, state.best_step = before

        state.best_val_loss, state.best_step = state.val_loss, state.step
        self.save("best", undo=undo)

    def save(
        self, name: str, *, last: bool = False, then: Action = lambda: None, undo: Action = lambda: None
    ) -> Path | None:
        """Save under `name`, with a few tries; None where the disk refuses and the run goes on without.

        Args:
            name: of the folder in the run's checkpoints.
            last: of the run: it is waited for, and must succeed.
            then: what to do once it is on disk.
            undo: what to do if it is not.

        Raises:
            StorageError: the disk refuses the last checkpoint of a run, or several one after the other.
        """
        self.wait()
        folder = self._job.run.checkpoints / name
        self._about = self._job.state.step, name, undo
        if whole := self._just_saved(folder):
            self._try(folder, [self._note, _by_first(lambda: self._link(whole, folder))], then)
            return folder if self._is_settled(last=last) else None
        self.newest = (self._job.state.step, folder)
        if self._job.watching.async_save and not last:
            self._save_beside(folder, then)
        else:
            self._try(folder, [self._note, *self._actions(folder)], then)
        return folder if self._thread is not None or self._is_settled(last=last) else None

    def _save_beside(self, folder: Path, then: Action) -> None:
        """Begin to write a copy of the weights as they are now."""
        try:
            self._note()
            snapshot = self._snapshot().copied()
        except (OSError, MemoryError, RuntimeError) as error:
            self._failure = error
            return
        write = partial(self._write, folder, snapshot)
        self._thread = Thread(target=self._try, args=(folder, [write], then), daemon=True)
        self._thread.start()  # a second signal does not wait for it

    def wait(self) -> None:
        """Until what is being written is on disk, or known not to be.

        Raises:
            StorageError: several failed, one after the other.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._is_settled()

    def _just_saved(self, folder: Path) -> Path | None:
        """A checkpoint of this step under another name, whose files can be linked."""
        newest = self.newest
        if newest and newest[0] == self._job.state.step and newest[1] != folder:
            return newest[1] if distributed.on_first(newest[1].exists) else None
        return None

    def _note(self) -> None:
        """Have the state know what else belongs to this step, with the records safely on disk."""
        job, state = self._job, self._job.state
        state.seconds, state.scaler, state.records = self._watch.seconds, job.scaler.state_dict(), job.run.positions()
        if isinstance(job.rows, StreamedRows):
            state.shard_rows, state.shard_layout = job.rows.found, job.rows.layout

    def _link(self, whole: Path, folder: Path) -> None:
        link_checkpoint(whole, folder, self._job.state.to_json())

    def _actions(self, folder: Path) -> list[Action]:
        """What writes the weights; every process has done one before any begins the next."""
        if not is_sharded(self._job.model):
            return [_by_first(lambda: self._write(folder, self._snapshot()))]
        whole: list[Decoder] = []
        return [
            lambda: whole.append(self._gathered()),
            lambda: self._write_shard(folder),
            _by_first(lambda: self._publish(folder, whole.pop())),
        ]

    def _snapshot(self) -> Snapshot:
        job = self._job
        return Snapshot(job.model, optimizer_tensors(job.model, job.optimizer), job.state.to_json())

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        job = self._job
        model, optimizer, state = snapshot.model, snapshot.optimizer, snapshot.state
        save_checkpoint(folder, model, job.tokenizer, optimizer, state, job.keeping.companions)

    def _gathered(self) -> Decoder:
        """The full model, on rank 0."""
        reshard(self._job.model)
        return gathered(self._job.model)

    def _write_shard(self, folder: Path) -> None:
        """This process's shard of the optimizer."""
        tensors = optimizer_tensors(self._job.model, self._job.optimizer)
        rank, size = distributed.rank(), distributed.size()
        own = {name: tensor for name, tensor in tensors.items() if tensor.dim() or rank == 0}
        save_optimizer_part(_parts_of(folder), own, rank, size)

    def _publish(self, folder: Path, model: Decoder) -> None:
        save_checkpoint(folder, model, self._job.tokenizer, None, self._job.state.to_json(), _parts_of(folder))
        shutil.rmtree(_parts_of(folder), ignore_errors=True)

    def _try(self, folder: Path, actions: list[Action], then: Action) -> None:
        for pause in PAUSES:
            time.sleep(pause)
            began = self._watch.seconds
            try:
                for action in actions:  # one by one: what one sends the others must not mix with the next
                    distributed.together(action)
                if self.newest and self.newest[1] == folder:  # not a link
                    self.seconds = max(self._watch.seconds - began, 0.9 * self.seconds)
                distributed.together(_by_first(then))
            except (StorageError, OSError, MemoryError, RuntimeError) as error:
                self._failure = error
                if is_out_of_memory(error):
                    empty_cache(self._job.device)
                if distributed.is_first():
                    shutil.rmtree(_parts_of(folder), ignore_errors=True)
            else:
                self._failure = None
                return

    def _is_settled(self, *, last: bool = False) -> bool:
        """Whether the last save succeeded; what it means if it did not."""
        failure, self._failure = self._failure, None
        if failure is None:
            self._failures = 0
            return True
        if isinstance(failure, RuntimeError) and not is_out_of_memory(failure):
            raise failure
        self._failures += 1
        self.newest = None
        (step, name, undo), run = self._about, self._job.run
        undo()
        refused = _as_error(failure, run.path)
        if last or self._failures >= MOST_FAILURES:
            raise refused
        run.event("save_failed", step, checkpoint=name, reason=str(refused))
        self._display.line(f"Step {step}: {refused}. Going on; earlier checkpoints are whole")
        return False


def _as_error(failure: Exception, run: Path) -> SeedbedError:
    if isinstance(failure, StorageError):
        return failure
    if is_out_of_memory(failure):
        return OutOfMemoryError(f"{run}: no memory to save ({failure}); free some, and the same command goes on")
    return StorageError(f"{run}: {failure}")


def _by_first(work: Action) -> Action:
    return work if distributed.is_first() else lambda: None


def _parts_of(folder: Path) -> Path:
    """Where processes that share a model put their parts of the optimizer first."""
    return folder.with_name(f".{folder.name}-parts.tmp")
