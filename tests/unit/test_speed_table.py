"""The tables of docs/performance.md: medians and ranges, the best peer, what failed, losses that are too far apart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))

from steps import Steps

from machine import PeakMemory, memory_of, process_tree
from speed_table import best_peer, equality_table, flops_per_token, job_table, spread, summary


def run(speed: float, **more: Any) -> dict[str, Any]:
    return {"speed": speed, "peak_memory_mb": 2048, "first_step_seconds": 3.0, "final_loss": 4.25, **more}


@pytest.fixture
def job() -> dict[str, Any]:
    machine = {"cpu": "A processor", "cores": 2, "threads": 2, "torch": "2.13", "load": 0.1, "copy_gb_per_second": 9.5}
    machine |= {"instruction_sets": ["avx2"], "float32_gflops": 100.0, "bfloat16_gflops": 200.0}
    contenders = {
        "ours": {"is_peer": False, "runs": [run(130), run(150), run(140)]},
        "one": {"is_peer": True, "runs": [run(90), run(110), run(100)]},
        "another": {"is_peer": True, "runs": [run(70), run(60), {"error": "killed"}]},
        "broken": {"is_peer": True, "runs": [{"error": "no such option"}]},
    }
    block = {"date": "2026-11-21", "machine": machine, "peers": {"torch": "2.13", "trl": "1.16"}}
    return {**block, "title": "A job", "unit": "tokens/s", "contenders": contenders}


def test_a_row_has_median_range_and_ratio_to_the_best_peer(job: dict[str, Any]) -> None:
    lines = job_table("char", job).splitlines()
    assert lines[0] == "### A job"
    assert "| ours | 140 (130–150) | 1.40 | 2.00 | 3.0 | 4.25 |" in lines
    assert "| one | 100 (90–110) |  | 2.00 | 3.0 | 4.25 |" in lines


def test_a_run_that_failed_does_not_count(job: dict[str, Any]) -> None:
    lines = job_table("char", job).splitlines()
    assert "| another | 65.0 (60.0–70.0) |  | 2.00 | 3.0 | 4.25 |" in lines
    assert "| broken | failed | | | | |" in lines
    assert best_peer(job) == 100


def test_the_summary_sets_the_first_of_ours_beside_the_fastest_peer(job: dict[str, Any]) -> None:
    job["contenders"] |= {"ours --compile": {"is_peer": False, "runs": [run(400)]}}
    alone = {**job, "title": "Alone", "contenders": {"ours": job["contenders"]["ours"]}}
    lines = summary({"char": job, "share": alone, "equality": {"runs": {}}}).splitlines()
    assert lines[2:] == ["| A job | 140 tokens/s | 100 (one) | 1.40 |"]


def test_a_single_run_has_no_range() -> None:
    assert spread([1234.5]) == "1,234"
    assert spread([3.14]) == "3.1"


def test_share_of_the_machines_rate(job: dict[str, Any]) -> None:
    job["contenders"] = {"seedbed": {"is_peer": False, "runs": [run(500, parameters=30_000_000)]}}
    # 500 tokens/s of 6 · 30e6 + 12 · 8 · 512 · 512 operations, of 200 GFLOP/s
    assert flops_per_token(30_000_000) == 205_165_824
    assert "seedbed 51%" in job_table("matrix-share", job)


@pytest.mark.parametrize(("loss", "verdict"), [(2.515, ": within 0.02"), (2.53, ": NOT within 0.02")])
def test_equal_losses(loss: float, verdict: str) -> None:
    ways = {"float32": {"train_loss": 2.4, "val_loss": 2.5}, "default": {"train_loss": 2.4, "val_loss": loss}}
    said = equality_table({"date": "2026-11-21", "runs": {"a shape": ways}})
    assert verdict in said
    assert f"{loss - 2.5:+.4f} |" in said


def test_steps_after_the_warm_up() -> None:
    equal = Steps(warm_up=1, ends=[10.0, 12.0, 13.0, 17.0], tokens=[100] * 4)
    assert equal.tokens_per_second() == 50  # of 2, 1 and 4 seconds the median
    unequal = Steps(warm_up=2, ends=[10.0, 12.0, 13.0, 17.0], tokens=[100, 100, 100, 200])
    assert unequal.tokens_per_second() == 60


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells memory in /proc")
def test_memory_of_children_counts() -> None:
    hold = "import time; held = bytearray(100_000_000); print(flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        with PeakMemory(process.pid) as memory:
            process.stdout.readline()
            time.sleep(0.5)
        assert len(process_tree(process.pid)) == 2
        assert memory.bytes > 100_000_000
        os.killpg(process.pid, 9)
    assert memory_of(process.pid) == {}
