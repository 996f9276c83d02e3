"""Whole runs in this process: seconds long, on real text, stopped where a test wants."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seedbed.config import FLAGS, Layer, resolve
from seedbed.train import pretrain as pretraining
from seedbed.train.loop import Outcome
from seedbed.train.progress import Display

TINY: dict[str, Any] = {
    "model": "tiny",
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 2,
    "d_ff": 64,
    "max_seq_len": 32,
    "batch_size": 4,
    "vocab_size": 300,
    "precision": "fp32",
    "device": "cpu",
    "tensorboard": False,
}

TIMINGS = ("elapsed_hours", "remaining_hours", "tokens_per_second", "memory_mb")


class StoppingDisplay(Display):
    """Sends this process a real signal once a step has been made."""

    stop_at = 0

    def step(self, step: int, total_steps: int | None, metrics: Any) -> None:
        super().step(step, total_steps, metrics)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


RunIt = Callable[..., Outcome]


@pytest.fixture
def run_it(small_text_file: Path, monkeypatch: pytest.MonkeyPatch) -> RunIt:
    """`run_it(output, stop_at=7, epochs=2, ...)`: one sitting of a tiny run; options as the flags have them."""

    def run(output: Path, *, stop_at: int = 0, log: io.StringIO | None = None, **options: Any) -> Outcome:
        values = {"data": str(small_text_file), "output": str(output), **TINY, **options}
        monkeypatch.setattr(StoppingDisplay, "stop_at", stop_at)
        monkeypatch.setattr(pretraining, "Display", StoppingDisplay)
        config = resolve("scratch", [Layer(FLAGS, {name: v for name, v in values.items() if v is not None})])
        return pretraining.pretrain(config, Console(file=log or io.StringIO(), width=200))

    return run


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what a clock had a hand in."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The saved state of training without the clock's part."""
    state: dict[str, Any] = json.loads((checkpoint / "seedbed" / "state.json").read_text())
    return {k: v for k, v in state.items() if k not in ("seconds", "records")}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bytes of weights and of optimizer."""
    files = ("model.safetensors", "seedbed/optimizer.safetensors")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
