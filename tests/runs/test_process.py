"""The program as a process: signals, exit codes, what is on which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Training:
    """A long run in a process of its own."""

    def __init__(self, data: Path, output: Path, *flags: str) -> None:
        shape = "--model tiny --num_layers 2 --d_model 32 --num_heads 2 --d_ff 64 --max_seq_len 32 --vocab_size 300"
        options = f"{shape} --precision fp32 --device cpu --no_tensorboard --epochs 1000000 --early_stopping_patience 0"
        paths = ["--data", str(data), "--output", str(output)]
        command = [sys.executable, "-m", "seedbed", "pretrain", *paths, *options.split(), *flags]
        self.output = output
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )

    def wait_for_step(self, step: int) -> None:
        metrics = self.output / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("train_loss") >= step):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def training(small_text_file: Path, tmp_path: Path) -> Iterator[Training]:
    run = Training(small_text_file, tmp_path / "run", "--json")
    yield run
    run.process.kill()
    run.process.communicate()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_leaves(training: Training, name: str, code: int) -> None:
    training.wait_for_step(3)
    training.process.send_signal(signal.Signals[name])
    returncode, out, err = training.end()
    assert returncode == code
    assert f"{name}: saving after this step" in err
    summary = json.loads(out)
    assert summary["status"] == "interrupted"
    state = training.output / f"checkpoints/step-{summary['steps']}/seedbed/state.json"
    assert json.loads(state.read_text())["step"] == summary["steps"]


def test_a_second_interrupt_leaves_at_once(training: Training) -> None:
    training.wait_for_step(2)
    training.process.send_signal(signal.SIGSTOP)  # both arrive before another step can be made
    training.process.send_signal(signal.SIGINT)
    training.process.send_signal(signal.SIGTERM)
    training.process.send_signal(signal.SIGCONT)
    assert training.end()[0] == 130


def test_a_run_folder_has_one_writer(training: Training, small_text_file: Path) -> None:
    training.wait_for_step(1)
    second = Training(small_text_file, training.output)
    code, _, err = second.end()
    assert code == 5
    assert "another process is training in this run folder" in err
