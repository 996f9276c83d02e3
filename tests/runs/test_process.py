"""The program as a process: signals, exit codes, what is on which stream."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from seedbed.runs.folder import read_summary


def heed_hangups() -> None:
    """Also where the suite itself runs under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Training:
    """A long run in a process of its own."""

    def __init__(self, data: Path, output: Path, *flags: str, before: Callable[[], None]) -> None:
        shape = "--model tiny --num_layers 2 --d_model 32 --num_heads 2 --d_ff 64 --max_seq_len 32 --vocab_size 300"
        options = f"{shape} --precision fp32 --device cpu --no_tensorboard --epochs 1000000 --early_stopping_patience 0"
        paths = ["--data", str(data), "--output", str(output)]
        command = [sys.executable, "-m", "seedbed", "pretrain", *paths, *options.split(), *flags]
        self.output = output
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
            preexec_fn=before,
        )

    def steps(self) -> int:
        metrics = self.output / "metrics.jsonl"
        return metrics.read_text().count("train_loss") if metrics.exists() else 0

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while self.steps() < step:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close_its_output(self) -> None:
        assert self.process.stdout and self.process.stderr
        self.process.stdout.close()
        self.process.stderr.close()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


Begin = Callable[..., Training]


@pytest.fixture
def begin(small_text_file: Path, tmp_path: Path) -> Iterator[Begin]:
    """`begin("--max_steps", "60", before=...)`: a run in `tmp_path / "run"`, which does not outlive its test."""
    begun: list[Training] = []

    def one_more(*flags: str, before: Callable[[], None] = heed_hangups) -> Training:
        begun.append(Training(small_text_file, tmp_path / "run", *flags, before=before))
        return begun[-1]

    yield one_more
    for run in begun:
        run.process.kill()
        run.process.wait()


@pytest.fixture
def training(begin: Begin) -> Training:
    return begin("--json")


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
    training.process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    training.process.send_signal(signal.SIGINT)
    assert training.end()[0] == 130


def test_a_job_that_is_told_twice_saves(training: Training) -> None:
    """As where SIGTERM goes to every process of a job, and torchrun passes its own on."""
    training.wait_for_step(2)
    training.process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    training.process.send_signal(signal.SIGTERM)
    assert training.end()[0] == 143
    assert read_summary(training.output)["status"] == "interrupted"


def test_a_run_folder_has_one_writer(training: Training, begin: Begin) -> None:
    training.wait_for_step(1)
    code, _, err = begin().end()
    assert code == 5
    assert "another process is training in this run folder" in err


def test_a_reader_that_goes_away_does_not_end_a_run(begin: Begin) -> None:
    run = begin("--log_every", "1", "--max_steps", "300")
    run.wait_for_step(3)
    run.close_its_output()
    assert run.process.wait(60) == 0
    assert json.loads((run.output / "metrics.json").read_text())["steps"] == 300


def test_an_interrupt_that_also_ends_the_reader_is_saved(begin: Begin) -> None:
    """Ctrl-C goes to all of `seedbed pretrain ... | tee log`, and tee is the first to leave."""
    run = begin("--log_every", "1")
    run.wait_for_step(3)
    run.close_its_output()
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(30) == 130
    require_saved(run.output)


def test_a_terminal_that_is_closed_is_saved(begin: Begin) -> None:
    """The system sends SIGHUP, and what is printed after it fails with EIO."""
    run = begin_and_close_its_terminal(begin, signal.SIG_DFL)
    assert run.process.wait(30) == 129
    require_saved(run.output)


def test_under_nohup_a_terminal_that_is_closed_does_not_end_a_run(begin: Begin) -> None:
    run = begin_and_close_its_terminal(begin, signal.SIG_IGN, "--max_steps", "300")
    assert run.process.wait(60) == 0


def begin_and_close_its_terminal(begin: Begin, hangups: signal.Handlers, *flags: str) -> Training:
    """A run that has made some steps when the terminal it was started in is closed."""
    master, slave = os.openpty()

    def take_terminal() -> None:
        os.login_tty(slave)
        signal.signal(signal.SIGHUP, hangups)

    run = begin("--log_every", "1", *flags, before=take_terminal)
    os.close(slave)
    while run.steps() < 3:
        assert select.select([master], [], [], 60)[0]
        os.read(master, 1 << 16)
    os.close(master)
    return run


def require_saved(run: Path) -> None:
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["status"] == "interrupted"
    assert (run / f"checkpoints/step-{summary['steps']}/seedbed/manifest.json").exists()
