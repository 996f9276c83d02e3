"""How long a person waits for what only looks into run folders, against the start of Python itself.

    python benchmarks/waiting.py

Makes 200 run folders and long `metrics.jsonl` files out of one short real run, times whole processes in turns, and
keeps the medians in benchmarks/results/waiting.json.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import command, machine

RESULTS = Path(__file__).parent / "results/waiting.json"
RUNS = 200
LONG, VERY_LONG = 100_000, 1_000_000  # records
TRIES = 7
SHAPE = (
    "--model tiny --num_layers 2 --d_model 32 --num_heads 2 --d_ff 64 --max_seq_len 32 --batch_size 4 --vocab_size 300"
)
READ = "from pathlib import Path; from seedbed.runs.series import read_series; read_series(Path({run!r}))"


def main() -> None:
    """Measure, keep, print."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command(f"pretrain --data python-docs {SHAPE} --max_steps 200 --no_report --no_tensorboard --output {root}/run")
        for number in range(RUNS):
            copy_of(root / "run", root / f"many/run-{number}")
        long, very_long = (copy_of(root / "run", root / f"long-{records}", records) for records in (LONG, VERY_LONG))
        seedbed = [sys.executable, "-m", "seedbed"]
        waits = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "seedbed --help": [*seedbed, "--help"],
            "seedbed finetune --help": [*seedbed, "finetune", "--help"],
            f"seedbed runs list, {RUNS} runs": [*seedbed, "runs", "list", str(root / "many")],
            "seedbed diagnose, 200 records": [*seedbed, "diagnose", str(root / "run")],
            f"seedbed diagnose, {LONG:,} records": [*seedbed, "diagnose", str(long)],
            f"seedbed runs report, {LONG:,} records": [*seedbed, "runs", "report", str(long)],
            f"reading {VERY_LONG:,} records": [sys.executable, "-c", READ.format(run=str(very_long))],
        }
        seconds = in_turns(waits)
    RESULTS.write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    for name, figures in seconds.items():
        sys.stdout.write(f"{name:<40} {figures['median']:.2f} s\n")


def copy_of(run: Path, folder: Path, records: int = 0) -> Path:
    """A run folder without its weights; with `records` its steps again and again."""
    folder.mkdir(parents=True)
    for name in ("config.yaml", "metrics.json", "metrics.jsonl", "samples.jsonl"):
        shutil.copyfile(run / name, folder / name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        for step in range(len(steps), records):
            stream.write(json.dumps({**steps[step % len(steps)], "step": step + 1}) + "\n")
    return folder


def in_turns(waits: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Seconds of each command, its tries taken in turns with those of the others."""
    tries: dict[str, list[float]] = {name: [] for name in waits}
    for _ in range(TRIES):
        for name, words in waits.items():
            began = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            tries[name].append(time.perf_counter() - began)
    return {
        name: {"median": round(statistics.median(found), 3), "fastest": round(min(found), 3)}
        for name, found in tries.items()
    }


if __name__ == "__main__":
    main()
