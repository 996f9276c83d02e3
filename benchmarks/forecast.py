"""Forecast against what came: twelve short runs, each planned, trained, and compared.

    python benchmarks/forecast.py --starter FOLDER [--only PART]

Every plan and every run is a process of its own, one after the other, with one thread. FOLDER holds a transformers
model of the Llama family (SmolLM2-135M: `tests/starter.py`). The text is the documentation inside Python. Figures go to
`benchmarks/results/forecast.json`, tables into `docs/forecast-results.md`. About ten minutes on one idle core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from commands import command, machine, put_between

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "forecast.json"
PAGE = ROOT / "docs" / "forecast-results.md"

SMALL = "--model small --tokenizer char"
STARTER = "--model {starter}"
CONFIGURATIONS: dict[str, tuple[str, str]] = {
    "GPT-2, context 256, batch 4": ("pretrain", f"{SMALL} --arch gpt2 --max_seq_len 256 --batch_size 4 --max_steps 16"),
    "GPT-2, batch 16, adamw8bit": (
        "pretrain",
        f"{SMALL} --arch gpt2 --num_layers 3 --max_seq_len 128 --batch_size 16 --optimizer adamw8bit --max_steps 16",
    ),
    "Llama, context 64, batch 16": ("pretrain", f"{SMALL} --max_seq_len 64 --batch_size 16 --max_steps 16"),
    "Llama, context 1,024, checkpointing": (
        "pretrain",
        f"{SMALL} --max_seq_len 1024 --batch_size 2 --gradient_checkpointing --max_steps 10",
    ),
    "Llama, accumulation 4": (
        "pretrain",
        "--model tiny --vocab_size 4000 --max_seq_len 256 --batch_size 4 --grad_accumulation 4 --max_steps 16",
    ),
    "Qwen2, context 512, bf16": (
        "pretrain",
        f"{SMALL} --arch qwen2 --max_seq_len 512 --batch_size 2 --precision bf16 --max_steps 16",
    ),
    "Qwen2, batch 8, bf16, checkpointing": (
        "pretrain",
        f"{SMALL} --arch qwen2 --num_layers 4 --max_seq_len 256 --batch_size 8 --precision bf16 "
        "--gradient_checkpointing --max_steps 10",
    ),
    "SmolLM2-135M, whole": ("finetune", f"{STARTER} --max_seq_len 128 --batch_size 2 --max_steps 8"),
    "SmolLM2-135M, whole, bf16, adamw8bit": (
        "finetune",
        f"{STARTER} --max_seq_len 256 --batch_size 2 --precision bf16 --optimizer adamw8bit --max_steps 5",
    ),
    "SmolLM2-135M, LoRA": ("finetune", f"{STARTER} --lora --max_seq_len 256 --batch_size 2 --max_steps 6"),
    "SmolLM2-135M, LoRA, bf16, context 512": (
        "finetune",
        f"{STARTER} --lora --lora_r 8 --max_seq_len 512 --batch_size 1 --precision bf16 --max_steps 6",
    ),
    "SmolLM2-135M, last 8 blocks, checkpointing": (
        "finetune",
        f"{STARTER} --last_blocks 8 --max_seq_len 256 --batch_size 4 --gradient_checkpointing --max_steps 5",
    ),
}
"""Name to verb and flags; fp32 where nothing else is said."""


def measure(verb: str, flags: str, texts: Path, runs: Path) -> dict[str, Any]:
    """Plan a run, train it, and set the two beside each other."""
    precision = "" if "--precision" in flags else "--precision fp32"
    words = (
        f"{verb} {flags} {precision} --data {texts / 'train.txt'} --val_data {texts / 'held-out.txt'} --document line"
    )
    planned = command(f"plan {words}")
    output = runs / "run"
    came = command(f"{words} --output {output}")
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    disk = sum({f.stat().st_ino: f.stat().st_size for f in (output / "checkpoints").rglob("*") if f.is_file()}.values())
    shutil.rmtree(output)
    hours = [step["elapsed_hours"] for step in steps if "train_loss" in step]
    seconds = [3600 * (later - earlier) for earlier, later in itertools.pairwise(hours)]
    return {
        "parameters": came["parameters"],
        "trainable_parameters": came["trainable_parameters"],
        "steps": came["steps"],
        "peak_memory_mb": {"plan": planned["memory_mb"]["peak"], "run": came["peak_memory_mb"]},
        "step_seconds": {"plan": planned["step_seconds"], "run": round(statistics.median(seconds), 4)},
        "hours": {"plan": planned["hours"], "run": came["hours"]},
        "disk_mb": {"plan": planned["disk_mb"], "run": round(disk / 2**20, 1)},
        "memory_mb": planned["memory_mb"],
        "at_start": came.get("forecast"),
    }


def write_texts(folder: Path) -> None:
    """Documentation of Python's modules to train on, and a little more to validate on."""
    from seedbed.data.python_docs import python_docs

    lines = [" ".join(text.split()) for text in python_docs()]
    (folder / "train.txt").write_text("\n".join(lines[20:]), encoding="utf-8")
    (folder / "held-out.txt").write_text("\n".join(lines[:20])[:8000], encoding="utf-8")


def ratio(figures: dict[str, float]) -> float:
    return figures["plan"] / figures["run"]


def within(ratios: Sequence[float], limit: float) -> str:
    """How many of the ratios are off by at most `limit`, in words."""
    good = sum(abs(value - 1) <= limit for value in ratios)
    furthest = max(ratios, key=lambda ratio: abs(ratio - 1)) - 1
    return f"{good} of {len(ratios)} within {limit:.0%}; the furthest off is {furthest:+.0%}"


def table(results: dict[str, Any]) -> str:
    """The page's figures in Markdown."""
    lines = [
        "| Run | Memory (MB): plan | run | | Time (s): plan | run | | Disk (MB): plan | run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    runs = results["runs"]
    for name, run in runs.items():
        memory, hours, disk = run["peak_memory_mb"], run["hours"], run["disk_mb"]
        lines.append(
            f"| {name} | {memory['plan']:,.0f} | {memory['run']:,.0f} | {ratio(memory) - 1:+.0%} "
            f"| {3600 * hours['plan']:.1f} | {3600 * hours['run']:.1f} | {ratio(hours) - 1:+.0%} "
            f"| {disk['plan']:,.0f} | {disk['run']:,.0f} |"
        )
    memory_said = within([ratio(run["peak_memory_mb"]) for run in runs.values()], 0.15)
    time_said = within([ratio(run["hours"]) for run in runs.values()], 0.2)
    of = results["machine"]
    lines += [
        "",
        f"Peak memory: {memory_said}. Time: {time_said}.",
        "",
        f"Measured on {of['cpu']}, {of['threads']} thread, torch {of['torch']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for; keep the rest as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starter", required=True, help="a transformers folder of SmolLM2-135M")
    parser.add_argument("--only", default="", help="part of a configuration's name")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else {}
    results: dict[str, Any] = {"machine": machine(), "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder))
        for name, (verb, flags) in CONFIGURATIONS.items():
            if options.only in name:
                figures = measure(verb, flags.format(starter=options.starter), Path(folder), Path(folder))
                kept[name] = {"command": f"seedbed {verb} {flags.format(starter='STARTER')}", **figures}
            if name in kept:
                results["runs"][name] = kept[name]
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    put_between(PAGE, "<!-- figures -->", table(results), "<!-- end of figures -->")


if __name__ == "__main__":
    main()
