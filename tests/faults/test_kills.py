"""Runs that are killed, signalled and started twice, as processes: what is left is the run that nobody touched."""

from __future__ import annotations

import importlib
import io
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seedbed import checkpoint
from seedbed.config import FLAGS, Layer, resolve
from seedbed.errors import SeedbedError
from seedbed.train.estimate import forecast
from seedbed.train.run import run_training
from tests.faults.injection import forked, many, start
from tests.runs.conftest import TINY, same_run

OPTIONS: dict[str, Any] = {
    **TINY,
    "max_steps": 24,
    "epochs": 100,
    "grad_accumulation": 2,
    "dropout": 0.1,
    "warmup_steps": 5,
    "eval_every": 8,
    "save_every": 3,
    "learning_rate": 3e-3,
}

Sitting = Callable[..., int]


@pytest.fixture
def sitting(small_text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Sitting:
    """One sitting at a run, in this process, which does not take its time for a forecast; its exit code."""
    importlib.import_module("torch._dynamo")  # by every optimizer, a second each time in a child
    real = forecast.forecast
    monkeypatch.setattr(forecast, "forecast", lambda run, seconds: real(run, seconds / 100))

    def sit(output: Path, **more: Any) -> int:
        values = {"data": str(small_text_file), "output": str(output), **OPTIONS, **more}
        try:
            return run_training(resolve("scratch", [Layer(FLAGS, values)]), Console(file=io.StringIO())).exit_code
        except SeedbedError as error:
            return error.exit_code
        except KeyboardInterrupt:
            return 130
        except SystemExit as leaving:
            return int(str(leaving.code))

    return sit


@pytest.fixture
def straight(sitting: Sitting, tmp_path: Path) -> tuple[Path, float]:
    """The run that nobody touched, and how long it took."""
    assert forked(partial(sitting, tmp_path / "first")) == 0  # fills the cache
    began = time.monotonic()
    assert forked(partial(sitting, tmp_path / "straight")) == 0
    return tmp_path / "straight", time.monotonic() - began


def interrupt(sit: Callable[[], int], with_signal: signal.Signals, after: float) -> int:
    """Exit code of a sitting that gets a signal after so many seconds, if it is still there."""
    pid = start(sit)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, with_signal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def kill_until_done(run: Path, sitting: Sitting, seconds: float, choose: random.Random) -> int:
    """Kill a run up to six times, each time somewhere else, then let it end; how many kills struck."""
    kills = 0
    for _ in range(6):
        code = interrupt(partial(sitting, run), signal.SIGKILL, choose.uniform(0, seconds))
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
        kills += 1
    assert forked(partial(sitting, run)) == 0
    return kills


def test_killed_at_random(sitting: Sitting, straight: tuple[Path, float], tmp_path: Path) -> None:
    untouched, seconds = straight
    choose, kills, number = random.Random(0), 0, 0
    while kills < many(60):
        run = tmp_path / f"killed-{number}"
        kills += kill_until_done(run, sitting, seconds, choose)
        same_run(run, untouched)
        number += 1


@pytest.mark.parametrize("beside", [False, True], ids=["in training", "beside training"])
def test_killed_in_slow_saves(
    sitting: Sitting, straight: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    untouched, seconds = straight
    flush = checkpoint.flush  # type: ignore[attr-defined]

    def slowly(path: Path) -> None:
        time.sleep(0.01)
        flush(path)

    monkeypatch.setattr(checkpoint, "flush", slowly)
    choose, kills, number = random.Random(1), 0, 0
    while kills < many(40):
        run = tmp_path / f"killed-{number}"
        kills += kill_until_done(run, partial(sitting, async_save=beside), 2 * seconds, choose)
        same_run(run, untouched)
        number += 1


def test_killed_while_it_starts_and_reads_its_text(
    sitting: Sitting, straight: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills in the first moments, the text not yet tokenized; the cache is whole or not there."""
    untouched, seconds = straight
    monkeypatch.setenv("SEEDBED_CACHE", str(tmp_path / "cache"))
    choose, kills, number = random.Random(2), 0, 0
    while kills < many(30):
        run = tmp_path / f"killed-{number}"
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        kills += kill_until_done(run, sitting, 0.3 * seconds, choose)
        same_run(run, untouched)
        number += 1


CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def test_signals_at_any_moment_are_saved_and_go_on(
    sitting: Sitting, straight: tuple[Path, float], tmp_path: Path
) -> None:
    untouched, seconds = straight
    choose, struck, number = random.Random(3), 0, 0
    while struck < many(60):
        run = tmp_path / f"signalled-{number}"
        for _ in range(8):
            chosen = choose.choice(list(CODES))
            code = interrupt(partial(sitting, run), chosen, choose.uniform(0.25, 0.9) * seconds)
            if code == 0:
                break
            assert code == CODES[chosen]
            struck += 1
        else:
            assert forked(partial(sitting, run)) == 0
        same_run(run, untouched)
        number += 1
        assert number < 100, "the signals come too late"


@pytest.mark.parametrize("starts", [2, 8])
def test_one_of_several_starts_wins(sitting: Sitting, tmp_path: Path, starts: int) -> None:
    """A process that comes when the winner is done finds a finished run."""
    short = partial(sitting, max_steps=4, save_every=2, eval_every=4)
    assert forked(partial(short, tmp_path / "straight")) == 0
    lost = 0
    for race in range(many(25)):
        run = tmp_path / f"race-{race}"
        children = [start(partial(short, run)) for _ in range(starts)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes.count(0) >= 1 and set(codes) <= {0, 5}
        lost += codes.count(5)
        same_run(run, tmp_path / "straight")
    assert lost >= many(25) * (starts - 1) // 2
