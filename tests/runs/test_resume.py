"""A run that was stopped anywhere and goes on is the run that was never stopped, bit for bit."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from seedbed.errors import CheckpointError, ConfigError
from seedbed.parsing import parse_yaml
from seedbed.runs.folder import read_records
from seedbed.train.resume import AlreadyFinished, open_run
from tests.runs.conftest import RunIt, read_metrics, read_state, same_run

# Dropout, two micro-batches a step, validations inside and at the end of epochs, patience that counts.
OPTIONS: dict[str, Any] = {
    "max_steps": 11,
    "epochs": 3,
    "grad_accumulation": 2,
    "batch_size": 16,
    "dropout": 0.1,
    "eval_every": 3,
    "save_every": 2,
    "early_stopping_patience": 1,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_stopping_at_every_step_changes_nothing(run_it: RunIt, tmp_path: Path, arch: str) -> None:
    straight = run_it(tmp_path / "straight", arch=arch, **OPTIONS)
    steps = straight.summary["steps"]
    assert straight.exit_code == 0 and steps > 5
    for stop_at in range(1, steps):
        stopped = run_it(tmp_path / f"{stop_at}", stop_at=stop_at, arch=arch, **OPTIONS)
        assert (stopped.exit_code, stopped.summary["status"]) == (130, "interrupted"), stop_at
        resumed = run_it(tmp_path / f"{stop_at}", arch=arch, **OPTIONS)
        assert resumed.summary["status"] == straight.summary["status"]
        same_run(tmp_path / "straight", tmp_path / f"{stop_at}")


def test_stopping_at_every_step_of_one_run(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "straight", **OPTIONS)
    for stop_at in range(1, 11):
        run_it(tmp_path / "often", stop_at=stop_at, **OPTIONS)
    assert run_it(tmp_path / "often", **OPTIONS).exit_code == 0
    same_run(tmp_path / "straight", tmp_path / "often")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("packing", [True, False])
def test_other_optimizers_and_padding(run_it: RunIt, tmp_path: Path, optimizer: str, packing: bool) -> None:
    options = {**OPTIONS, "optimizer": optimizer, "packing": packing}
    run_it(tmp_path / "straight", **options)
    run_it(tmp_path / "stopped", stop_at=4, **options)
    run_it(tmp_path / "stopped", **options)
    same_run(tmp_path / "straight", tmp_path / "stopped")


def test_killed_without_warning(run_it: RunIt, tmp_path: Path, small_text_file: Path) -> None:
    """SIGKILL in a process of its own, after its second checkpoint; records past the checkpoint are made again."""
    options = {**OPTIONS, "max_steps": 150, "epochs": 400, "early_stopping_patience": 0, "eval_every": 50}
    run = tmp_path / "killed"
    flags = [f"--{name}={value}" for name, value in options.items()]
    shape = "--model tiny --num_layers 2 --d_model 32 --num_heads 2 --d_ff 64 --max_seq_len 32 --vocab_size 300"
    base = [*shape.split(), "--precision", "fp32", "--device", "cpu", "--no_tensorboard"]
    command = [sys.executable, "-m", "seedbed", "pretrain", "--data", str(small_text_file), "--output", str(run)]
    process = subprocess.Popen([*command, *base, *flags], stdout=subprocess.DEVNULL, env=os.environ)
    try:
        while not any(run.glob("checkpoints/step-[4-9]*")):
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 4 <= killed_at < 150
    shorter = {**options, "epochs": 400}
    resumed = run_it(run, **shorter)
    assert resumed.summary["steps"] == 150
    run_it(tmp_path / "straight", **shorter)
    same_run(tmp_path / "straight", run)


def test_resume_from_a_named_checkpoint_makes_a_new_run(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", **{**OPTIONS, "keep_checkpoints": 0})
    before = read_metrics(tmp_path / "a")
    checkpoint = tmp_path / "a/checkpoints/step-4"
    outcome = run_it(tmp_path / "b", resume_from=str(checkpoint), **{**OPTIONS, "keep_checkpoints": 0})
    assert outcome.summary["parent"] == str(checkpoint)
    same_run(tmp_path / "a", tmp_path / "b")
    assert read_metrics(tmp_path / "a") == before


@pytest.mark.parametrize("length", [16, 48])
def test_learnt_positions_stay_as_many(run_it: RunIt, tmp_path: Path, length: int) -> None:
    run_it(tmp_path / "a", arch="gpt2", max_steps=2)
    checkpoint = tmp_path / "a/checkpoints/final"
    with pytest.raises(ConfigError, match=f"--max_seq_len {length}: .* has learnt 32 positions") as refused:
        run_it(tmp_path / "b", arch="gpt2", max_steps=4, resume_from=str(checkpoint), max_seq_len=length)
    assert ("seedbed finetune" in str(refused.value)) == (length < 32)
    assert not (tmp_path / "b").exists()


def test_rotary_positions_take_another_length(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", arch="llama", max_steps=2)
    checkpoint = tmp_path / "a/checkpoints/final"
    outcome = run_it(tmp_path / "b", arch="llama", max_steps=4, resume_from=str(checkpoint), max_seq_len=48)
    assert (outcome.summary["steps"], outcome.summary["shape"]["max_seq_len"]) == (4, 48)


def test_a_finished_run_is_left_alone(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", **OPTIONS)
    before = (tmp_path / "a/metrics.json").read_bytes()
    log = io.StringIO()
    assert run_it(tmp_path / "a", log=log, **OPTIONS).exit_code == 0
    assert "is finished" in log.getvalue()
    assert (tmp_path / "a/metrics.json").read_bytes() == before


def test_other_options_do_not_go_on_with_a_run(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", stop_at=2, **OPTIONS)
    with pytest.raises(ConfigError, match=r"--learning_rate 0\.5 \(the run has 0\.001\)"):
        run_it(tmp_path / "a", **{**OPTIONS, "learning_rate": 0.5})
    assert run_it(tmp_path / "a", **{**OPTIONS, "max_training_hours": 3.0}).summary["status"] != "interrupted"


def test_other_text_is_told(run_it: RunIt, tmp_path: Path, small_text_file: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(small_text_file.read_bytes())
    run_it(tmp_path / "run", stop_at=2, data=str(text), **OPTIONS)
    untouched = io.StringIO()
    run_it(tmp_path / "run", stop_at=3, log=untouched, data=str(text), **OPTIONS)
    assert "text_changed" not in untouched.getvalue()
    text.write_text(text.read_text(encoding="utf-8").replace("the", "THE"), encoding="utf-8")
    with pytest.raises(ConfigError, match="not the one that this run began with"):
        run_it(tmp_path / "run", data=str(text), strict=True, **OPTIONS)
    changed = io.StringIO()
    run_it(tmp_path / "run", stop_at=4, log=changed, data=str(text), **OPTIONS)
    assert "Warning (text_changed)" in changed.getvalue()
    events = read_records(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event.get("name") == "text_changed"] == [3]


def test_a_damaged_checkpoint_is_passed_over(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "straight", **OPTIONS)
    run_it(tmp_path / "a", stop_at=5, **OPTIONS)
    newest = tmp_path / "a/checkpoints/step-5/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.unlink()  # best/ may share the file
    newest.write_bytes(bytes(data))
    log = io.StringIO()
    run_it(tmp_path / "a", log=log, **OPTIONS)
    assert "step-5 is damaged (model.safetensors" in log.getvalue()
    same_run(tmp_path / "straight", tmp_path / "a")


def test_only_damaged_checkpoints(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", stop_at=1, **OPTIONS)
    (tmp_path / "a/checkpoints/step-1/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        run_it(tmp_path / "a", **OPTIONS)


def test_default_output_of_a_finished_run_gets_a_number(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seedbed.config import FLAGS, Layer, read_config_file, resolve

    monkeypatch.chdir(tmp_path)
    config = resolve("scratch", [read_config_file(str(tiny_run / "config.yaml")), Layer(FLAGS, {})])
    again = config.update("default", output=None)
    first = open_run(again)
    assert not isinstance(first, AlreadyFinished)
    first.run.write_config("begun")
    first.run.write_summary({"status": "done"})
    first.run.close()
    second = open_run(again)
    assert not isinstance(second, AlreadyFinished)
    assert second.run.path.name == f"{first.run.path.name}-2"
    second.run.close()


def test_a_branch_that_gets_no_better_has_a_best_of_its_own(run_it: RunIt, tmp_path: Path) -> None:
    options = {**OPTIONS, "keep_checkpoints": 0, "early_stopping_patience": 1, "epochs": 9, "eval_every": 2}
    run_it(tmp_path / "a", **options)
    checkpoint = tmp_path / "a/checkpoints/step-4"
    ruined = {**options, "learning_rate": 5.0, "min_lr": 5.0, "max_steps": 400}
    outcome = run_it(tmp_path / "b", resume_from=str(checkpoint), **ruined)
    assert outcome.summary["status"] == "early_stopped"
    assert read_state(tmp_path / "b/checkpoints/best")["best_step"] == outcome.summary["best_step"] > 4


def test_one_way_to_warm_up_replaces_the_other(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", **{**OPTIONS, "warmup_steps": 3, "keep_checkpoints": 0})
    checkpoint = tmp_path / "a/checkpoints/step-4"
    run_it(tmp_path / "b", resume_from=str(checkpoint), **{**OPTIONS, "warmup_ratio": 0.5})
    saved = parse_yaml((tmp_path / "b/config.yaml").read_text())
    assert (saved["warmup_steps"], saved["warmup_ratio"]) == (None, 0.5)


def test_checkpoints_without_their_config_are_not_overwritten(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", stop_at=4, **OPTIONS)
    (tmp_path / "a/config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.yaml that says what run they are of"):
        run_it(tmp_path / "a", **OPTIONS)


def test_going_on_with_other_batches_counts_epochs_anew(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", **{**OPTIONS, "keep_checkpoints": 0})
    options = {**OPTIONS, "batch_size": 4, "epochs": 2, "max_steps": 1000, "early_stopping_patience": 0}
    outcome = run_it(tmp_path / "b", resume_from=str(tmp_path / "a/checkpoints/step-4"), **options)
    closed = {path.name for path in (tmp_path / "b/checkpoints").glob("epoch-*")}
    assert outcome.summary["steps"] == outcome.summary["total_steps"]
    assert closed == {"epoch-1", "epoch-2"}
