"""Each protection taken out, one at a time: what it prevents then happens, so the tests of it can fail."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seedbed.errors import RunInUseError
from seedbed.runs import folder as folders
from seedbed.runs.folder import RunFolder
from seedbed.train import loop, saving, step
from seedbed.train.guard import Guard
from seedbed.train.job import Job
from tests.runs.conftest import RunIt, events, read_metrics

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_without_the_guard_bad_numbers_reach_the_weights(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step.batch_objective

    def spoilt(job: Job, batch: Any) -> Any:
        nats, objective = real(job, batch)
        factor = math.nan if job.state.step == 3 else 1.0
        return nats * factor, objective * factor

    monkeypatch.setattr(step, "batch_objective", spoilt)
    monkeypatch.setattr(Guard, "objection", lambda *_: "")
    with pytest.raises(ValueError, match="JSON"):
        run_it(tmp_path / "a", max_steps=6)
    run_it(tmp_path / "b", max_steps=3, eval_every=3)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "b/checkpoints/final/model.safetensors").values())


def test_without_its_lock_a_folder_has_two_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunFolder(tmp_path / "run")
    with pytest.raises(RunInUseError):
        RunFolder(tmp_path / "run")
    monkeypatch.setattr(folders, "fcntl", None)
    RunFolder(tmp_path / "run").close()
    first.close()


def test_without_a_second_try_every_hiccup_costs_a_checkpoint(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = saving.save_checkpoint, [0]  # type: ignore[attr-defined]

    def once(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise FULL
        real(*args)

    monkeypatch.setattr(saving, "save_checkpoint", once)
    monkeypatch.setattr(saving, "PAUSES", (0.0,))
    run_it(tmp_path / "a", max_steps=8, save_every=2, eval_every=8)
    assert len(events(tmp_path / "a", "save_failed")) == 1


def test_without_forgetting_records_a_killed_run_has_some_twice(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies after a checkpoint has records of steps that will be made again."""
    real = loop.take_step  # type: ignore[attr-defined]

    def dies(job: Job, used: float) -> Any:
        if job.state.step == 7:
            raise KeyboardInterrupt
        return real(job, used)

    for name, forgets in (("a", True), ("b", False)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "take_step", dies)
            run_it(tmp_path / name, max_steps=12, save_every=4, eval_every=12)
        with monkeypatch.context() as patch:
            if not forgets:
                patch.setattr(RunFolder, "truncate", lambda *_: None)
            run_it(tmp_path / name, max_steps=12, save_every=4, eval_every=12)
        steps = [record["step"] for record in read_metrics(tmp_path / name) if "lr" in record]
        assert (steps == sorted(set(steps))) == forgets


def test_without_knowing_it_too_little_memory_ends_a_run(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step.batch_objective

    def hungry(job: Job, batch: Any) -> Any:
        if job.micro_batch_size > 2:
            raise MEMORY
        return real(job, batch)

    monkeypatch.setattr(step, "batch_objective", hungry)
    assert run_it(tmp_path / "a", max_steps=3).exit_code == 0
    monkeypatch.setattr(loop, "is_out_of_memory", lambda _error: False)
    with pytest.raises(RuntimeError, match="can't allocate"):
        run_it(tmp_path / "b", max_steps=3)
