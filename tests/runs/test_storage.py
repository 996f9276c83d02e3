"""Disks that refuse: the run goes on where it can, and what was saved stays whole."""

from __future__ import annotations

import errno
import io
import os
import shutil
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from seedbed import disk
from seedbed.checkpoint import damage, link_checkpoint, save_checkpoint
from seedbed.errors import OutOfMemoryError, StorageError
from seedbed.runs import folder as records
from seedbed.runs.folder import RunFolder, read_records, read_summary
from seedbed.train import loop, saving
from seedbed.train.step import take_step
from tests.runs.conftest import RunIt, events, read_metrics, same_weights

OPTIONS: dict[str, Any] = {"max_steps": 20, "eval_every": 10, "save_every": 2, "keep_checkpoints": 0}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))


class Refusing:
    """A function that raises at the calls whose numbers, from 0, are listed."""

    def __init__(self, real: Callable[..., Any], error: Exception, at: range) -> None:
        self.calls, self.refused = 0, 0
        self._real, self._error, self._at = real, error, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self._at:
            self.refused += 1
            raise self._error
        return self._real(*args, **kwargs)


def test_an_error_that_passes_is_not_noticed(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_it(tmp_path / "straight", **OPTIONS)
    stale = StorageError("it could not be written (Stale file handle)")
    refusing = Refusing(save_checkpoint, stale, range(3, 5))
    monkeypatch.setattr(saving, "save_checkpoint", refusing)
    assert run_it(tmp_path / "a", **OPTIONS).exit_code == 0
    assert refusing.refused == 2 and not events(tmp_path / "a", "save_failed")
    assert same_weights(tmp_path / "a/checkpoints/final", tmp_path / "straight/checkpoints/final")


def test_a_full_disk_does_not_end_the_run(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saves fail for good; those before stay whole, those after are made, and the run is as if nothing was."""
    run_it(tmp_path / "straight", **OPTIONS)
    refusing = Refusing(save_checkpoint, FULL, range(2, 8))
    monkeypatch.setattr(saving, "save_checkpoint", refusing)
    log = io.StringIO()
    assert run_it(tmp_path / "a", log=log, **OPTIONS).exit_code == 0
    assert refusing.refused == 6
    assert [event["checkpoint"] for event in events(tmp_path / "a", "save_failed")] == ["step-6", "step-8"]
    assert "No space left on device" in log.getvalue() and "Going on" in log.getvalue()
    names = {path.name for path in (tmp_path / "a/checkpoints").iterdir()}
    assert {"step-4", "step-10", "step-20", "best", "final"} <= names and not {"step-6", "step-8"} & names
    assert all(not damage(path) for path in (tmp_path / "a/checkpoints").iterdir())
    assert same_weights(tmp_path / "a/checkpoints/final", tmp_path / "straight/checkpoints/final")
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "straight")


def test_a_disk_that_stays_full_ends_it_with_the_last_save_whole(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = save_checkpoint
    monkeypatch.setattr(saving, "save_checkpoint", Refusing(real, FULL, range(2, 10_000)))
    with pytest.raises(StorageError, match="No space left"):
        run_it(tmp_path / "a", **{**OPTIONS, "max_steps": 60})
    assert len(events(tmp_path / "a", "save_failed")) == saving.MOST_FAILURES - 1
    assert not damage(tmp_path / "a/checkpoints/step-4")
    monkeypatch.setattr(saving, "save_checkpoint", real)
    assert run_it(tmp_path / "a", **{**OPTIONS, "max_steps": 60}).exit_code == 0


def test_a_last_checkpoint_that_is_refused_is_no_success(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = link_checkpoint
    monkeypatch.setattr(saving, "link_checkpoint", Refusing(real, FULL, range(10_000)))
    with pytest.raises(StorageError):
        run_it(tmp_path / "a", max_steps=6, eval_every=6)
    monkeypatch.setattr(saving, "link_checkpoint", real)
    assert run_it(tmp_path / "a", max_steps=6, eval_every=6).exit_code == 0


def test_a_best_that_is_not_on_disk_is_not_the_best(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 12, "eval_every": 4, "learning_rate": 1e-2}
    monkeypatch.setattr(saving, "save_checkpoint", Refusing(save_checkpoint, FULL, range(3)))
    outcome = run_it(tmp_path / "a", **options)
    assert events(tmp_path / "a", "save_failed")[0]["checkpoint"] == "best"
    assert outcome.summary["best_step"] in (8, 12)
    assert not damage(tmp_path / "a/checkpoints/best")


def test_beside_training_the_same_is_written(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", **OPTIONS, dropout=0.1)
    run_it(tmp_path / "b", **OPTIONS, dropout=0.1, async_save=True)
    names = sorted(path.name for path in (tmp_path / "a/checkpoints").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b/checkpoints").iterdir()) and len(names) > 8
    for name in names:
        assert not damage(tmp_path / "b/checkpoints" / name)
        assert same_weights(tmp_path / "a/checkpoints" / name, tmp_path / "b/checkpoints" / name), name
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")


def test_training_goes_on_beside_a_save(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that waits for the next step would wait for ever if that one waited for it."""
    real, take, steps = save_checkpoint, take_step, [0]

    def count(job: Any, used: float) -> Any:
        steps[0] = job.state.step
        return take(job, used)

    def slowly(folder: Path, *rest: Any) -> None:
        began, deadline = steps[0], time.monotonic() + 20
        while folder.name == "step-4" and steps[0] < began + 2:
            assert time.monotonic() < deadline, "training waits"
            time.sleep(0.001)
        real(folder, *rest)

    monkeypatch.setattr(loop, "take_step", count)
    monkeypatch.setattr(saving, "save_checkpoint", slowly)
    options = {"max_steps": 12, "save_every": 4, "eval_every": 12, "async_save": True}
    assert run_it(tmp_path / "a", **options).exit_code == 0
    assert not events(tmp_path / "a", "save_failed")
    assert not damage(tmp_path / "a/checkpoints/step-4")


def test_a_save_beside_training_that_fails_is_told(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = save_checkpoint
    monkeypatch.setattr(saving, "save_checkpoint", Refusing(real, FULL, range(2, 5)))
    assert run_it(tmp_path / "a", **OPTIONS, async_save=True).exit_code == 0
    assert [event["checkpoint"] for event in events(tmp_path / "a", "save_failed")] == ["step-6"]
    monkeypatch.setattr(saving, "save_checkpoint", Refusing(real, FULL, range(2, 10_000)))
    with pytest.raises(StorageError):
        run_it(tmp_path / "b", **{**OPTIONS, "max_steps": 60}, async_save=True)


class FillingFile(FileIO):
    """A file on a disk that has room for some more bytes, then for none, then for all again."""

    room = 10_000_000

    def write(self, data: Any) -> int:
        if FillingFile.room <= 0:
            raise FULL
        written = super().write(bytes(data)[: FillingFile.room])
        FillingFile.room -= written
        return written


def test_records_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that fits only half is finished later; none is lost, doubled or mixed up."""
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering=-1: FillingFile(str(self), mode))  # noqa: ARG005
    monkeypatch.setattr(records, "_cut_half_line", lambda _path: None)
    run = RunFolder.__new__(RunFolder)
    run.path, run._records, run._summary_refused = tmp_path, {}, None
    for step in range(30):
        FillingFile.room = 0 if 10 <= step < 20 else 7 if step == 9 else 10_000_000
        run.append("metrics.jsonl", {"step": step, "loss": 1.25})
        assert (run.unwritten is not None) == (9 <= step < 20)
    monkeypatch.undo()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(30))


def test_a_run_whose_last_records_are_refused_says_so(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.write_atomically
    refusing = Refusing(real, FULL, range(3, 10_000))
    monkeypatch.setattr(records, "write_atomically", refusing)
    with pytest.raises(StorageError, match="last records"):
        run_it(tmp_path / "a", max_steps=6, eval_every=2)
    assert refusing.refused
    monkeypatch.setattr(records, "write_atomically", real)
    assert run_it(tmp_path / "a", max_steps=6, eval_every=2).summary["status"] == "done"


def test_a_run_whose_folder_is_deleted_says_what_it_could_not_write(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that there is no run to report on."""
    real = take_step

    def delete(job: Any, used: float) -> Any:
        if job.state.step == 3:
            shutil.rmtree(job.run.path)
        return real(job, used)

    monkeypatch.setattr(loop, "take_step", delete)
    said = io.StringIO()
    with pytest.raises(StorageError, match="No such file"):
        run_it(tmp_path / "a", max_steps=6, eval_every=6, report=True, log=said)
    assert "Warning: no report was written" in said.getvalue()


def test_no_memory_for_the_last_save_is_told_as_that(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(saving, "PAUSES", (0.0,))
    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with pytest.raises(OutOfMemoryError, match="no memory to save"):
        run_it(tmp_path / "a", max_steps=2)
    assert read_summary(tmp_path / "a")["status"] == "failed"
