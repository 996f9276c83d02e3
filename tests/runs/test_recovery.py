"""Bad numbers and too little memory, in the middle of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seedbed.errors import DivergedError, OutOfMemoryError
from seedbed.train import loop, step
from seedbed.train.estimate.forecast import Forecast
from seedbed.train.job import Job
from seedbed.train.measure import held_out_loss
from seedbed.train.recovery import LOWERED, MOST_ROLLBACKS
from tests.runs.conftest import RunIt, events, read_metrics, read_state, same_weights

OPTIONS: dict[str, Any] = {"max_steps": 60, "eval_every": 20, "save_every": 10, "learning_rate": 3e-3, "dropout": 0.1}
MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")


def spoil(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Job], bool], factor: float) -> None:
    """Multiply loss and gradient of the steps that are bad."""
    real = step.batch_objective

    def spoilt(job: Job, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nats, objective = real(job, batch)
        times = factor if is_bad(job) else 1.0
        return nats * times, objective * times

    monkeypatch.setattr(step, "batch_objective", spoilt)


def require_finite(run: Path) -> None:
    for name in ("model.safetensors", "seedbed/optimizer.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(run / "checkpoints/final" / name).values())


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1000.0])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"grad_accumulation": 3, "epochs": 9}])
def test_single_bad_steps_are_skipped(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, options: dict[str, Any]
) -> None:
    bad = (25, 26, 40)
    spoil(monkeypatch, lambda job: job.state.step in bad, factor)
    outcome = run_it(tmp_path / "a", **{**OPTIONS, **options})
    assert outcome.summary["status"] == "done"
    assert [event["step"] - 1 for event in events(tmp_path / "a", "skipped_step")] == list(bad)
    assert not events(tmp_path / "a", "roll_back")
    require_finite(tmp_path / "a")


def test_bad_rows_in_a_row_are_set_aside(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 25 to 34 are bad whenever they come: the run goes back once, passes them over and ends well."""
    spoil(monkeypatch, lambda job: 25 <= job.state.step < 35, math.nan)
    log = io.StringIO()
    outcome = run_it(tmp_path / "a", log=log, **OPTIONS)
    assert outcome.summary["status"] == "done" and outcome.summary["steps"] == 60
    [back] = events(tmp_path / "a", "roll_back")
    assert (back["step"], back["to"], back["checkpoint"]) == (35, 30, "step-30")
    assert back["set_aside"] == list(range(25, 35)) and back["learning_rate_factor"] == LOWERED
    assert [event["step"] for event in events(tmp_path / "a", "set_aside")] == list(range(31, 36))
    assert "0.5 times the learning rate" in log.getvalue()
    rates = {record["step"]: record["lr"] for record in read_metrics(tmp_path / "a") if "lr" in record}
    assert set(rates) == {*range(1, 26), *range(36, 61)}
    require_finite(tmp_path / "a")


def test_going_back_goes_on_after_a_stop(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda job: 25 <= job.state.step < 35, math.nan)
    run_it(tmp_path / "straight", **OPTIONS)
    for stop_at in (24, 37, 45):
        run_it(tmp_path / f"{stop_at}", stop_at=stop_at, **OPTIONS)
        run_it(tmp_path / f"{stop_at}", **OPTIONS)
        final = tmp_path / f"{stop_at}/checkpoints/final"
        assert same_weights(final, tmp_path / "straight/checkpoints/final")
        assert read_state(final) == read_state(tmp_path / "straight/checkpoints/final")


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_weights_that_went_bad_are_left_behind(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """No row is at fault: what was saved since holds the same weights, so the way back leads past it."""
    take = step.take_step
    spoilt: list[bool] = []

    def take_and_spoil(job: Job, used: float) -> Any:
        result = take(job, used)
        if job.state.step == 22 and not spoilt:
            spoilt.append(True)
            with torch.no_grad():
                next(job.model.parameters()).view(-1)[0] = value
        return result

    monkeypatch.setattr(loop, "take_step", take_and_spoil)
    outcome = run_it(tmp_path / "a", **{**OPTIONS, "save_every": 2, "keep_checkpoints": 2, "eval_every": 60})
    assert outcome.summary["status"] == "done"
    backs = events(tmp_path / "a", "roll_back")
    assert [back["to"] for back in backs] == [32, 22]
    require_finite(tmp_path / "a")
    for checkpoint in (tmp_path / "a/checkpoints").iterdir():
        assert torch.isfinite(load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]).all()


def test_a_run_that_stays_bad_ends(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda job: job.state.step >= 25, math.nan)
    with pytest.raises(DivergedError, match=f"also after going back {MOST_ROLLBACKS} times"):
        run_it(tmp_path / "a", **{**OPTIONS, "max_steps": 200})
    backs = events(tmp_path / "a", "roll_back")
    assert [event["learning_rate_factor"] for event in backs] == [LOWERED**n for n in range(1, MOST_ROLLBACKS + 1)]


def out_of_memory(monkeypatch: pytest.MonkeyPatch, where: str, beyond: int, at_step: int) -> list[int]:
    """Run out at a place when more than so many rows are at once, from a step on; the rows of each failure."""
    struck: list[int] = []

    def fail(job: Job) -> None:
        if job.state.step >= at_step and job.micro_batch_size > beyond:
            struck.append(job.micro_batch_size)
            raise MEMORY

    if where == "forward":
        real = step.batch_objective

        def forward(job: Job, batch: Any) -> Any:
            fail(job)
            return real(job, batch)

        monkeypatch.setattr(step, "batch_objective", forward)
    elif where == "optimizer":
        clip = torch.nn.utils.clip_grad_norm_
        jobs: list[Job] = []
        take = step.take_step

        def remember(job: Job, used: float) -> Any:
            jobs[:] = [job]
            return take(job, used)

        def before_update(*args: Any) -> Any:
            if jobs:  # the forecast takes updates, too
                fail(jobs[0])
            return clip(*args)

        monkeypatch.setattr(loop, "take_step", remember)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", before_update)
    else:
        measure = held_out_loss

        def evaluation(job: Any, *rest: Any) -> Any:
            fail(job)
            return measure(job, *rest)

        monkeypatch.setattr(loop, "held_out_loss", evaluation)
    return struck


@pytest.mark.parametrize("where", ["forward", "optimizer", "evaluation"])
def test_less_memory_means_fewer_rows_at_once(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The same updates from smaller micro-batches, as if the run had been configured so."""
    options = {**OPTIONS, "dropout": 0.0, "max_steps": 30, "batch_size": 8}
    run_it(tmp_path / "two", **{**options, "batch_size": 2, "grad_accumulation": 4})
    struck = out_of_memory(monkeypatch, where, beyond=2, at_step=0)
    log = io.StringIO()
    outcome = run_it(tmp_path / "a", log=log, **options)
    assert outcome.summary["status"] == "done" and struck == [8, 4]
    assert [event["micro_batch_size"] for event in events(tmp_path / "a", "out_of_memory")] == [4, 2]
    assert "going on with 2 rows at once, 8 an update as before" in log.getvalue()
    last, same = (read_metrics(tmp_path / name)[-1]["val_loss"] for name in ("a", "two"))
    assert last == pytest.approx(same, abs=1e-4 if where == "evaluation" else 1e-6)


def test_a_branch_of_a_run_that_ran_out_of_memory_may_take_fewer_rows(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "max_steps": 4, "batch_size": 8}
    with monkeypatch.context() as patch:
        out_of_memory(patch, "forward", beyond=4, at_step=0)
        run_it(tmp_path / "a", **options)
    struck = out_of_memory(monkeypatch, "forward", beyond=2, at_step=0)
    branch = {**options, "max_steps": 6, "resume_from": str(tmp_path / "a/checkpoints/final")}
    assert run_it(tmp_path / "b", **{**branch, "batch_size": 2}).summary["steps"] == 6
    assert struck == []
    assert run_it(tmp_path / "c", **{**branch, "batch_size": 16}).summary["steps"] == 6
    assert struck == [4]


def test_memory_that_does_not_hold_one_row(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    struck = out_of_memory(monkeypatch, "forward", beyond=0, at_step=5)
    with pytest.raises(OutOfMemoryError, match=r"one row of 32 tokens.*--gradient_checkpointing, --max_seq_len 16"):
        run_it(tmp_path / "a", **{**OPTIONS, "save_every": 2})
    assert struck == [4, 2, 1]
    assert (tmp_path / "a/checkpoints/step-4").is_dir()


def test_an_update_torn_in_the_middle_is_undone(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the weights moved: back to the last checkpoint, and on with fewer rows."""
    options = {**OPTIONS, "dropout": 0.0, "max_steps": 30}
    run_it(tmp_path / "straight", **options)
    take, real = step.take_step, torch.optim.AdamW.step
    torn: list[bool] = []

    def tear(optimizer: torch.optim.Optimizer, *_args: Any) -> Any:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(1.0)
        raise MEMORY

    def take_or_tear(job: Job, used: float) -> Any:
        strikes = job.state.step == 16 and not torn
        torn.extend([True] * strikes)
        monkeypatch.setattr(torch.optim.AdamW, "step", tear if strikes else real)
        return take(job, used)

    monkeypatch.setattr(loop, "take_step", take_or_tear)
    outcome = run_it(tmp_path / "a", **options)
    assert outcome.summary["status"] == "done"
    [back] = events(tmp_path / "a", "roll_back")
    assert (back["step"], back["to"]) == (16, 10)
    last, same = (read_metrics(tmp_path / name)[-1]["val_loss"] for name in ("a", "straight"))
    assert last == pytest.approx(same, abs=1e-5)


def test_no_memory_for_a_sample_is_no_end(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise MEMORY

    monkeypatch.setattr(loop, "generate", fail)
    assert run_it(tmp_path / "a", max_steps=4, eval_every=2).summary["status"] == "done"
    assert [event["during"] for event in events(tmp_path / "a", "out_of_memory")] == ["writing", "writing"]


def test_other_errors_are_not_taken_for_it(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(step, "batch_objective", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_it(tmp_path / "a", max_steps=4)


def test_a_run_that_the_machine_would_kill_is_refused(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forecast, "peak_bytes", 1e18)
    log = io.StringIO()
    with pytest.raises(OutOfMemoryError, match=r"needs about .* MB and this machine has .*--allow memory"):
        run_it(tmp_path / "a", max_steps=4, log=log)
    assert "Forecast:" in log.getvalue()
    assert "needs about" not in log.getvalue() and "Starting training" not in log.getvalue()
    assert not (tmp_path / "a").exists()
    assert run_it(tmp_path / "a", max_steps=4, allow=["memory"]).exit_code == 0
