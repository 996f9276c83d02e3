"""What a step means, when a run ends, what it leaves behind."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seedbed.checkpoint import damage
from seedbed.config import FLAGS, Layer, resolve
from seedbed.errors import ConfigError, DataError, DivergedError
from seedbed.runs.folder import read_records
from seedbed.train import step
from seedbed.train.build import build_job
from seedbed.train.job import Job
from seedbed.train.loop import Loop
from seedbed.train.progress import Display
from seedbed.train.resume import Start, open_run
from seedbed.train.stopping import StopRequest
from tests.runs.conftest import TINY, RunIt, read_metrics


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/final/model.safetensors")


def build(output: Path, data: Path, **options: Any) -> Job:
    """A job that is ready to train."""
    from rich.console import Console

    values = {**TINY, "data": str(data), "output": str(output), **options}
    start = open_run(resolve("scratch", [Layer(FLAGS, values)]))
    assert isinstance(start, Start)
    return build_job(start, Display(Console(file=io.StringIO()), 100))


@pytest.mark.parametrize("packing", [True, False])
def test_batch_times_accumulation_is_one_update(run_it: RunIt, tmp_path: Path, packing: bool) -> None:
    """1x8, 2x4, 4x2 and 8x1: ten steps give the same weights, with padding of unequal length too."""
    runs = {}
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        options = {"batch_size": batch, "grad_accumulation": accumulation, "max_steps": 10, "packing": packing}
        run_it(tmp_path / f"{batch}", **options, learning_rate=3e-4)
        runs[batch] = weights(tmp_path / f"{batch}")
    for batch in (4, 2, 1):
        for name, expected in runs[8].items():
            assert (runs[batch][name] - expected).abs().max() <= 1e-6, f"batch {batch}: {name}"


def test_update_is_torchs_adamw_on_the_mean_loss(small_text_file: Path, tmp_path: Path) -> None:
    """Three updates against a plain loop: mean cross-entropy of all targets, clipping, AdamW with two groups."""
    options = {"grad_accumulation": 2, "max_steps": 8, "weight_decay": 0.1, "learning_rate": 3e-4}
    job = build(tmp_path / "a", small_text_file, **options)
    plain = type(job.model)(job.model.config)
    plain.load_state_dict(job.model.state_dict())
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for number in range(3):
        batches = job.micro_batches(number)
        logits = [plain.logits(plain(b.input_ids, b.position_ids, b.segment_ids)).flatten(0, 1) for b in batches]
        labels = [b.labels.flatten() for b in batches]
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = job.schedule.at(number + 1)
        optimizer.step()
        result = step.take_step(job, 0.0)
        job.state.step += 1
        assert result.loss == pytest.approx(loss.item(), abs=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for ours, theirs in zip(job.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    job.run.close()


def test_learning_rate_recorded_is_the_documented_formula(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", max_steps=10, warmup_steps=4, learning_rate=1e-3, min_lr=1e-4)
    for record in read_metrics(tmp_path / "a"):
        if "lr" in record:
            step = record["step"]
            cosine = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))
            assert record["lr"] == pytest.approx(1e-3 * step / 4 if step < 4 else cosine)


def test_the_run_folder(run_it: RunIt, tmp_path: Path) -> None:
    outcome = run_it(tmp_path / "a", epochs=2, max_steps=None, eval_every=20, tensorboard=True, sample_prompt="The ")
    run = tmp_path / "a"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "metrics.json", "samples.jsonl", "tensorboard", "checkpoints"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "final", "epoch-1", "epoch-2"}
    summary = json.loads((run / "metrics.json").read_text())
    assert summary == outcome.summary
    assert summary["status"] == "done"
    named = {
        "status",
        "best_step",
        "best_val_loss",
        "best_val_ppl",
        "bits_per_byte",
        "steps",
        "tokens",
        "hours",
        "seed",
    }
    named |= {"parameters", "trainable_parameters", "peak_memory_mb", "tokens_per_second", "device", "parent", "judge"}
    assert named | {"notes"} <= set(summary)
    assert summary["best_val_ppl"] == pytest.approx(math.exp(summary["best_val_loss"]))
    records = list(read_records(run / "metrics.jsonl"))
    steps = [record["step"] for record in records if "train_loss" in record]
    assert steps == list(range(1, summary["steps"] + 1))
    train = {"step", "epoch", "tokens", "elapsed_hours", "train_loss", "train_ppl", "lr", "grad_norm"}
    assert train | {"tokens_per_second", "data_share", "memory_mb", "remaining_hours"} == set(records[0])
    validations = [record for record in records if "val_loss" in record]
    assert validations[-1]["step"] == summary["steps"]
    assert min(record["val_loss"] for record in validations) == summary["best_val_loss"]
    assert [r["step"] for r in read_records(run / "samples.jsonl")] == [r["step"] for r in validations]
    assert records[-1]["epoch"] == 2 and records[-1]["tokens"] == summary["tokens"]


def test_learning_happens(run_it: RunIt, tmp_path: Path) -> None:
    outcome = run_it(tmp_path / "a", epochs=6, learning_rate=1e-2)
    first = next(iter(read_records(tmp_path / "a/metrics.jsonl")))["train_loss"]
    assert first == pytest.approx(math.log(300), abs=0.3)
    assert outcome.summary["best_val_loss"] < first - 1.5


def test_early_stopping_ends_with_the_best_weights(run_it: RunIt, tmp_path: Path) -> None:
    """A rate that cannot help after the first epoch."""
    log = io.StringIO()
    options = {"learning_rate": 0.3, "lr_schedule": "constant", "early_stopping_patience": 2, "epochs": 30}
    outcome = run_it(tmp_path / "a", log=log, **options)
    best = outcome.summary["best_step"]
    assert (outcome.exit_code, outcome.summary["status"]) == (0, "early_stopped")
    assert outcome.summary["steps"] > best
    final, kept = (tmp_path / "a/checkpoints" / name / "model.safetensors" for name in ("final", "best"))
    assert final.read_bytes() == kept.read_bytes()
    assert "No improvement for 2 epoch(s)" in log.getvalue()
    assert f"final/ holds the best weights, those of step {best}" in log.getvalue()


def test_early_stopping_without_any_validation_loss(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16 may have it whose held-out text overflows: there are no best weights to end with."""
    monkeypatch.setattr("seedbed.train.loop.held_out_loss", lambda *_: math.inf)
    log = io.StringIO()
    outcome = run_it(tmp_path / "a", log=log, early_stopping_patience=2, epochs=30)
    assert (outcome.exit_code, outcome.summary["status"]) == (0, "early_stopped")
    assert outcome.summary["best_step"] is None
    assert damage(tmp_path / "a/checkpoints/final") == []
    assert "checkpoints/final" in log.getvalue()


@pytest.mark.parametrize("same", [True, False])
def test_validation_text_that_is_learnt_too_is_told(
    run_it: RunIt, small_text_file: Path, tmp_path: Path, same: bool
) -> None:
    text = small_text_file.read_text(encoding="utf-8")
    (tmp_path / "held_out.txt").write_text(text[-2000:] if same else "Other words, one after another. " * 40)
    run_it(tmp_path / "a", data=str(small_text_file), val_data=str(tmp_path / "held_out.txt"), max_steps=1)
    events = [event.get("name") for event in read_records(tmp_path / "a/events.jsonl")]
    assert ("held_out_overlap" in events) is same


def test_patience_zero_is_off(run_it: RunIt, tmp_path: Path) -> None:
    options = {"learning_rate": 0.3, "lr_schedule": "constant", "early_stopping_patience": 0, "epochs": 4}
    assert run_it(tmp_path / "a", **options).summary["status"] == "done"


def test_rotation_never_removes_best(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", max_steps=12, save_every=2, eval_every=4, keep_checkpoints=2)
    names = {path.name for path in (tmp_path / "a/checkpoints").iterdir()}
    assert names == {"best", "final", "step-10", "step-12"}


def test_time_limit_saves_and_goes_on_in_what_is_left(run_it: RunIt, tmp_path: Path) -> None:
    log = io.StringIO()
    options = {"epochs": 100_000, "eval_every": 100_000, "early_stopping_patience": 0}
    outcome = run_it(tmp_path / "a", log=log, max_training_hours=3 / 3600, **options)
    assert (outcome.exit_code, outcome.summary["status"]) == (75, "time_limit")
    assert outcome.summary["hours"] <= 3 / 3600
    assert "Elapsed: 0.00h | Remaining: 0.00h" in log.getvalue()
    assert (tmp_path / "a/checkpoints/time-limit/seedbed/state.json").exists()
    steps = outcome.summary["steps"]
    again = run_it(tmp_path / "a", max_training_hours=3 / 3600, **options)
    assert again.exit_code == 75 and again.summary["steps"] <= steps + 2
    more = run_it(tmp_path / "a", max_training_hours=5 / 3600, **options)
    assert more.exit_code == 75 and more.summary["steps"] > steps
    assert more.summary["hours"] > outcome.summary["hours"]


def test_stopping_before_the_first_step_saves_nothing(
    run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 2, "eval_every": 2}
    log = io.StringIO()
    outcome = run_it(tmp_path / "a", log=log, max_training_hours=1e-4, **options)
    assert (outcome.exit_code, outcome.summary["steps"]) == (75, 0)
    real = Loop.run

    def signalled(loop: Loop, request: StopRequest) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return real(loop, request)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", signalled)
        assert run_it(tmp_path / "a", log=log, **options).exit_code == 130
    said = log.getvalue()
    assert said.count("before the first step: nothing was trained, and nothing is saved") == 2
    assert "more --max_training_hours" in said and "saved to" not in said and "saved at" not in said
    assert not list((tmp_path / "a").glob("checkpoints/*"))
    assert run_it(tmp_path / "a", max_training_hours=1.0, **options).summary["steps"] == 2


def test_cosine_time_reaches_the_floor_when_the_hours_run_out(run_it: RunIt, tmp_path: Path) -> None:
    options = {"lr_schedule": "cosine_time", "min_lr": 1e-5, "warmup_ratio": 0.1, "eval_every": 100_000}
    outcome = run_it(tmp_path / "a", max_training_hours=7 / 3600, **options)
    assert outcome.exit_code == 75
    rates = [r["lr"] for r in read_records(tmp_path / "a/metrics.jsonl") if "lr" in r]
    peak = max(rates)
    assert peak == pytest.approx(2e-3, rel=0.05)
    after = rates[rates.index(peak) :]
    assert after == sorted(after, reverse=True)
    assert rates[-1] < 0.1 * peak


def test_bad_numbers_never_reach_the_weights(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = step.batch_objective

    def poisoned(job: Job, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        factor = math.nan if job.state.step == 3 else 1.0
        nats, objective = real(job, batch)
        return nats * factor, objective * factor

    monkeypatch.setattr(step, "batch_objective", poisoned)
    outcome = run_it(tmp_path / "a", max_steps=6)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "a").values())
    [event] = read_records(tmp_path / "a/events.jsonl")
    assert event["event"] == "skipped_step" and event["step"] == 4 and event["rows"] == [12, 15]
    assert outcome.summary["status"] == "done"


def test_divergence_ends_the_run(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = step.batch_objective

    def endless(job: Job, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nats, objective = real(job, batch)
        return nats * math.inf, objective * math.inf

    monkeypatch.setattr(step, "batch_objective", endless)
    with pytest.raises(DivergedError, match="learning_rate"):
        run_it(tmp_path / "a", max_steps=60)
    assert json.loads((tmp_path / "a/metrics.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_train_the_same_model(
    run_it: RunIt, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = run_it(tmp_path / "plain", max_steps=20, learning_rate=1e-2)
    other = run_it(tmp_path / "other", max_steps=20, learning_rate=1e-2, **options)
    tolerance = 1e-6 if "gradient_checkpointing" in options else 0.02
    assert other.summary["best_val_loss"] == pytest.approx(plain.summary["best_val_loss"], abs=tolerance)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "other").values())


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_trains_the_same_model(run_it: RunIt, tmp_path: Path) -> None:
    options = {"max_steps": 3, "num_layers": 1, "eval_every": 3}
    plain = run_it(tmp_path / "plain", **options)
    compiled = run_it(tmp_path / "compiled", compile=True, **options)
    assert compiled.summary["best_val_loss"] == pytest.approx(plain.summary["best_val_loss"], abs=1e-4)


def test_compile_without_a_compiler_is_refused(run_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="--compile needs a C"):
        run_it(tmp_path / "a", compile=True, max_steps=3)
    assert not (tmp_path / "a").exists()


def test_fp16_scale_is_restored(run_it: RunIt, tmp_path: Path) -> None:
    options = {"precision": "fp16", "max_steps": 8, "eval_every": 4}
    run_it(tmp_path / "straight", **options)
    run_it(tmp_path / "stopped", stop_at=5, **options)
    run_it(tmp_path / "stopped", **options)
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "stopped")


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_branch_takes_another_precision(run_it: RunIt, tmp_path: Path, before: str, after: str) -> None:
    run_it(tmp_path / "a", precision=before, max_steps=4)
    branch = {"resume_from": str(tmp_path / "a/checkpoints/final"), "precision": after, "max_steps": 6}
    outcome = run_it(tmp_path / "b", **branch)
    assert (outcome.exit_code, outcome.summary["steps"], outcome.summary["precision"]) == (0, 6, after)


def test_validation_data_of_its_own(run_it: RunIt, tmp_path: Path, text_file: Path) -> None:
    log = io.StringIO()
    run_it(tmp_path / "a", log=log, max_steps=2, val_data=str(text_file))
    assert f"Validation: {text_file}" in log.getvalue()


def test_no_validation(run_it: RunIt, tmp_path: Path) -> None:
    outcome = run_it(tmp_path / "a", max_steps=3, val_split=0)
    assert outcome.summary["best_val_loss"] is None
    assert {path.name for path in (tmp_path / "a/checkpoints").iterdir()} == {"final"}


def test_long_sample_prompt_is_refused_before_training(run_it: RunIt, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sample_prompt is"):
        run_it(tmp_path / "a", sample_prompt="word " * 200)
    assert not (tmp_path / "a").exists()


def test_nothing_is_left_behind_by_bad_data(run_it: RunIt, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.\n\nTo learn.\n")
    with pytest.raises(DataError, match="lower --max_seq_len"):
        run_it(tmp_path / "a", data=str(tmp_path / "short.txt"))
    assert not (tmp_path / "a").exists()


def test_padded_rows_need_less_text_than_one_row(run_it: RunIt, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short for a row.\n\nTo learn.\n")
    options = {"tokenizer": "char", "vocab_size": None, "max_steps": 2, "val_split": 0, "max_seq_len": 64}
    outcome = run_it(tmp_path / "a", data=str(tmp_path / "short.txt"), packing=False, **options)
    assert outcome.summary["steps"] == 2


def test_the_text_of_a_small_parquet_file_may_be_large(run_it: RunIt, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"Number {number} again. " * 400 for number in range(9)]})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    options = {"tokenizer": "char", "vocab_size": None, "max_steps": 2, "max_seq_len": 2048, "batch_size": 1}
    assert (tmp_path / "rows.parquet").stat().st_size < 2048
    assert run_it(tmp_path / "a", data=str(tmp_path / "rows.parquet"), **options).summary["steps"] == 2
