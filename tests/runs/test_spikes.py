"""What a run keeps of a step whose loss jumps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from seedbed.train import loop
from seedbed.train.job import Job
from seedbed.train.spikes import RecentLosses
from seedbed.train.step import StepResult, take_step
from tests.runs.conftest import RunIt, events, read_metrics


def test_a_jump_is_seen_once_and_noise_is_not() -> None:
    noisy = [3.0 + 0.2 * math.sin(37 * step) for step in range(200)]
    quiet = RecentLosses()
    assert not any(quiet.add(step, loss) for step, loss in enumerate(noisy))
    jumping = RecentLosses()
    losses = [6.0 if 100 <= step < 104 else loss for step, loss in enumerate(noisy)]
    assert [step for step, loss in enumerate(losses) if jumping.add(step, loss)] == [100]


def test_nothing_is_unusual_before_there_is_something_usual() -> None:
    losses = RecentLosses([3.0, 3.1, 2.9])
    assert losses.add(4, 50.0) is None


def test_a_falling_loss_and_one_that_never_varies_do_not_spike() -> None:
    falling, flat = RecentLosses(), RecentLosses()
    assert not any(falling.add(step, 9 * 0.97**step) for step in range(200))
    assert not any(flat.add(step, 2.0 + 1e-9 * step) for step in range(200))


def test_strange_rows_are_named(run_it: RunIt, small_text_file: Path, tmp_path: Path) -> None:
    """A document of signs that stand nowhere else: the rows it fills are the worst ones."""
    strange = "".join(chr(0x4E00 + number) for number in range(60))
    poisoned = tmp_path / "poisoned.txt"
    poisoned.write_text(small_text_file.read_text() + "\n\n" + strange)
    options = {"data": str(poisoned), "val_split": 0.0, "tokenizer": "char", "vocab_size": None}
    run_it(tmp_path / "a", epochs=1, learning_rate=3e-3, **options)
    found = events(tmp_path / "a", "loss_spike")
    assert found
    for event in found:
        worst = event["worst_rows"][0]
        assert event["loss"] > event["usual"] * 1.1 and event["times"] >= 6
        assert event["rows"][0] <= worst["row"] <= event["rows"][1]
        assert set(worst["text"]) & set(strange)
        assert worst["loss"] > event["usual"]
        assert event["float32_loss"] is None and event["padding"] == 0


def test_broken_weights_are_bad_everywhere(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = take_step

    def breaking(job: Job, budget_used: float) -> StepResult:
        if job.state.step == 30:
            with torch.no_grad():
                job.model.get_parameter("final_norm.weight").mul_(-3)
        return real(job, budget_used)

    monkeypatch.setattr(loop, "take_step", breaking)
    run_it(tmp_path / "a", max_steps=40, batch_size=8, precision="bf16")
    [event] = events(tmp_path / "a", "loss_spike")
    assert event["step"] == 31
    assert event["again_loss"] > 1.1 * event["usual"]
    assert event["float32_loss"] == pytest.approx(event["again_loss"], rel=0.02)
    assert event["worst_share"] < 0.6  # three of eight rows


def test_looking_at_a_spike_changes_nothing(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_it(tmp_path / "a", max_steps=30, dropout=0.1)
    monkeypatch.setattr("seedbed.train.spikes.DEVIATIONS", -100.0)
    monkeypatch.setattr("seedbed.train.spikes.LEAST_RISE", -1.0)
    run_it(tmp_path / "b", max_steps=30, dropout=0.1)
    assert events(tmp_path / "b", "loss_spike")
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
