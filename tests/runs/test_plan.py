"""What `plan` says, and what a run of the same flags then is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    "--model tiny --num_layers 2 --d_model 64 --num_heads 2 --d_ff 128 --max_seq_len 64 --batch_size 8 "
    "--vocab_size 500 --precision fp32 --device cpu --val_split 0.02 --eval_every 20 --save_every 15 --max_steps 50"
)


def seedbed(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "seedbed", *words, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.fixture(scope="module")
def planned_and_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    words = ["pretrain", "--data", str(text_file), *WORDS.split()]
    run = tmp_path_factory.mktemp("runs") / "run"
    return seedbed("plan", *words), seedbed(*words, "--output", str(run), "--no_tensorboard", "--no_report")


def test_a_plan_has_the_shape_of_the_run(planned_and_run: tuple[dict[str, Any], dict[str, Any]]) -> None:
    planned, run = planned_and_run
    assert planned["parameters"] == run["parameters"]
    assert planned["trainable_parameters"] == run["trainable_parameters"]
    assert (planned["steps"], planned["precision"]) == (run["steps"], run["precision"])


def test_the_peak_is_about_that_of_the_run(planned_and_run: tuple[dict[str, Any], dict[str, Any]]) -> None:
    planned, run = planned_and_run
    assert planned["memory_mb"]["peak"] == pytest.approx(run["peak_memory_mb"], rel=0.2)


def test_checkpoints_take_the_room_that_was_said(planned_and_run: tuple[dict[str, Any], dict[str, Any]]) -> None:
    planned, run = planned_and_run
    files = [path.stat() for path in Path(run["run"]).glob("checkpoints/*/**/*.safetensors")]
    taken = sum({file.st_ino: file.st_size for file in files}.values()) / 2**20
    assert taken <= planned["disk_mb"] * 1.05
    assert taken >= planned["disk_mb"] * 0.7  # the best one may be the last
