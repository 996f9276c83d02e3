"""Run folders as training leaves them, made without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seedbed.config import FLAGS, Layer, resolve
from seedbed.runs.folder import RunFolder
from seedbed.runs.info import RunInfo, read_run

DONE = {
    "status": "done",
    "steps": 100,
    "total_steps": 100,
    "best_step": 100,
    "best_val_loss": 2.5,
    "best_val_ppl": 12.1825,
    "bits_per_byte": 1.0,
    "hours": 0.5,
    "tokens_per_second": 1234.5,
    "peak_memory_mb": 2054.1,
    "parameters": 134_515_008,
    "trainable_parameters": 134_515_008,
    "device": "cpu (x86_64, 1 threads)",
    "parent": None,
    "judge": None,
    "notes": "",
}


def write_run(
    path: Path,
    options: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    *,
    regime: str = "finetune",
    metrics: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    events: Iterable[Mapping[str, Any]] = (),
) -> RunInfo:
    """A run whose options were given by flags; `summary` says what is not as in `DONE`."""
    needed = {"data": "book.txt"} | ({} if regime == "scratch" else {"model": "models/base"})
    needed |= {"domain": "plays"} if regime == "continue" else {}
    run = RunFolder(path)
    run.write_config(resolve(regime, [Layer(FLAGS, {**needed, **(options or {})})]).to_yaml())
    run.write_summary({**DONE, **(summary or {})})
    for name, records in (("metrics", metrics), ("samples", samples), ("events", events)):
        for record in records:
            run.append(f"{name}.jsonl", record)
    run.close()
    return read_run(path)
