"""Sweeps with real processes: to the table, stopped and killed in the middle, halved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import yaml
from rich.console import Console

from seedbed.errors import RunInUseError
from seedbed.runs.folder import RunFolder, read_summary
from seedbed.runs.info import read_run
from seedbed.sweep import SweepResult, run_sweep
from tests.runs.conftest import TINY, read_metrics, read_state

START = (
    "import sys; from seedbed.sweep import run_sweep; sys.exit(run_sweep(*sys.argv[1:3], int(sys.argv[3])).exit_code)"
)


def write_file(folder: Path, text: Path, **content: object) -> Path:
    """A sweep of tiny models that learn `text`."""
    base = {"data": str(text), **TINY, **content.pop("base", {})}  # type: ignore[dict-item]
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"verb": "pretrain", "base": base, **content}), encoding="utf-8")
    return file


def sweep(file: Path, output: Path, at_once: int = 1) -> tuple[SweepResult, str]:
    """The result and what was said."""
    said = StringIO()
    return run_sweep(file, output, at_once, Console(file=said, width=200)), said.getvalue()


def test_a_sweep_ends_in_a_table_and_a_run_that_dies_costs_its_row_alone(small_text_file: Path, tmp_path: Path) -> None:
    file = write_file(
        tmp_path,
        small_text_file,
        runs={
            "slow": {"learning_rate": "1e-4"},
            "fast": {"from": "slow", "learning_rate": "1e-2"},
            "lost": {"from": "slow", "max_seq_len": 10_000_000},
        },
        budget={"max_steps": 12},
    )
    out = tmp_path / "out"
    result, said = sweep(file, out, at_once=2)
    assert result.exit_code == 0
    assert {run.name: run.status for run in result.runs} == {"slow": "done", "fast": "done", "lost": "not_begun"}
    assert "Warning: lost failed with exit code 3: " in said and "less than one row" in said

    assert read_run(out / "fast").parent == str(out / "slow")
    assert (out / "slow/metrics.jsonl").read_text().count("train_loss") == 12
    rows = [line.split("|")[1].strip() for line in (out / "table.md").read_text().splitlines() if line[:1] == "|"]
    assert rows[2:] == ["fast", "slow"], "the best comes first"
    assert (out / "table.csv").read_text().count("\n") == 3
    assert "fast" in (out / "report.html").read_text()


def test_halving_keeps_the_better_half_on_the_schedule_of_whole_runs(small_text_file: Path, tmp_path: Path) -> None:
    file = write_file(
        tmp_path,
        small_text_file,
        grid={"learning_rate": [1e-5, 1e-2]},
        budget={"max_steps": 12},
        halving={"keep": 0.5, "rungs": [6]},
    )
    out = tmp_path / "out"
    result, said = sweep(file, out, at_once=2)
    worse, better = result.runs
    assert (better.name, better.status) == ("learning_rate-0.01", "done")
    assert (worse.status, read_summary(worse.run)["steps"]) == ("stopped_by_halving", 6)
    assert worse.reason.startswith("stopped by halving at step 6: validation loss ")
    assert worse.reason in said

    rates = [record["lr"] for record in read_metrics(better.run) if "lr" in record]
    assert len(rates) == 12 and rates[5] > rates[6] > rates[11], "the cosine is that of the whole run"

    again, said = sweep(file, out)
    assert again.runs == result.runs
    assert "until step" not in said and "(2 of 2)" not in said, "what is finished is not started again"


LONG = {"epochs": 1_000_000, "early_stopping_patience": 0, "save_every": 100}


@contextmanager
def started(file: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a process of its own, with two runs at once."""
    command = [sys.executable, "-c", START, str(file), str(out), "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(what: str, condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def steps(run: Path) -> int:
    records = run / "metrics.jsonl"
    return records.read_text().count("train_loss") if records.exists() else 0


def is_free(run: Path) -> bool:
    """Whether no process has the run's folder."""
    try:
        RunFolder(run).close()
    except RunInUseError:
        return False
    return True


def test_a_sweep_that_was_killed_leaves_no_run_behind_and_goes_on(small_text_file: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path, small_text_file, base=LONG, grid={"learning_rate": [1e-3, 1e-2]})
    out = tmp_path / "out"
    runs = [out / "learning_rate-0.001", out / "learning_rate-0.01"]
    with started(file, out) as process:
        wait_until("both train", lambda: all(steps(run) > 5 for run in runs), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until("the runs save and leave", lambda: all(read_summary(r)["status"] == "interrupted" for r in runs))
        wait_until("their folders are free", lambda: all(map(is_free, runs)))
    saved = [read_summary(run)["steps"] for run in runs]
    assert all(
        read_state(run / f"checkpoints/step-{step}")["step"] == step for run, step in zip(runs, saved, strict=True)
    )

    with started(file, out) as process:
        wait_until("both go on", lambda: all(steps(run) > step for run, step in zip(runs, saved, strict=True)), process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 143
    assert "the same command goes on" in said
    for run, step in zip(runs, saved, strict=True):
        summary = read_summary(run)
        assert summary["status"] == "interrupted" and summary["steps"] > step
        [resumed] = read_run(run).events("resume")
        assert resumed["step"] == step


def test_a_run_that_another_process_trains_is_waited_for(small_text_file: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path, small_text_file, runs={"a": {}}, budget={"max_steps": 2})
    held, said = RunFolder(tmp_path / "out/a"), StringIO()

    def let_go_once_it_waits() -> None:
        wait_until("the sweep waits", lambda: "a: another process is training it; waiting" in said.getvalue())
        held.close()

    other = threading.Thread(target=let_go_once_it_waits)
    other.start()
    result = run_sweep(file, tmp_path / "out", 1, Console(file=said, width=200))
    other.join()
    assert [run.status for run in result.runs] == ["done"]


def test_when_nothing_could_be_trained_the_exit_code_says_why(small_text_file: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path, small_text_file, runs={"a": {"max_seq_len": 10_000_000}})
    result, said = sweep(file, tmp_path / "out")
    assert result.exit_code == 3
    assert "Warning: a failed with exit code 3: " in said
    assert not (tmp_path / "out/table.md").exists()
    assert json.dumps(result.to_json())
