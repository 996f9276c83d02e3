"""Whole fine-tuning against LoRA on real instructions: ranks, alpha, batches, schedules, clipping, seeds.

    python benchmarks/instruction_tuning.py --model FOLDER --data instruction-1100.json
    python benchmarks/instruction_tuning.py --model FOLDER --data instruction-1100.json --only lora-r16 lora-r64

Every run is one `seedbed finetune` command in a process of its own; the script prints each before it starts it, and
passes over those that are done. The rows are divided in their order: 85 % to train, then 10 % to test, the rest to
validate. Results go to benchmarks/results/instruction_tuning.json, and as tables into docs/instruction-results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from commands import command, machine, put_between

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/instruction_tuning.json"
PAGE = ROOT / "docs/instruction-results.md"

BEGIN, END = "<!-- tables made by benchmarks/instruction_tuning.py -->", "<!-- end of tables -->"

COMMON = "--chat_template chatml --no_packing --max_seq_len 256 --eval_every 117 --no_tensorboard --keep_checkpoints 1"
DECAY = "--min_lr 1e-5 --warmup_ratio 0.2 --weight_decay 0.1 --learning_rate 5e-5"
FLAT = "--lr_schedule constant --warmup_ratio 0 --weight_decay 0.1 --learning_rate 5e-5"

GRID: dict[str, str] = {
    "whole-flat": f"--epochs 1 --batch_size 2 {FLAT}",
    "whole-cosine": f"--epochs 1 --batch_size 2 {DECAY}",
    "whole-cosine-unclipped": f"--epochs 1 --batch_size 2 {DECAY} --max_grad_norm 0",
    "lora-r16": f"--epochs 1 --batch_size 2 {DECAY} --lora_r 16 --lora_alpha 16",
    "lora-r16-batch4": f"--epochs 1 --batch_size 4 {DECAY} --lora_r 16 --lora_alpha 16",
    "lora-r16-alpha32": f"--epochs 1 --batch_size 2 {DECAY} --lora_r 16 --lora_alpha 32",
    "lora-r32": f"--epochs 1 --batch_size 2 {DECAY} --lora_r 32 --lora_alpha 32",
    "lora-r64-batch4": f"--epochs 1 --batch_size 4 {DECAY} --lora_r 64 --lora_alpha 64",
    "lora-r64-gentle": f"--epochs 1 --batch_size 4 {DECAY} --lora_r 64 --lora_alpha 64 --learning_rate 2.5e-5 "
    "--warmup_ratio 0.3",
    "lora-r64-no-warmup": f"--epochs 1 --batch_size 4 {DECAY} --lora_r 64 --lora_alpha 64 --learning_rate 3e-5 "
    "--warmup_ratio 0",
    "lora-r64-1e-4": f"--epochs 1 --batch_size 4 {DECAY} --lora_r 64 --lora_alpha 64 --learning_rate 1e-4 "
    "--warmup_ratio 0",
    "lora-r16-batch4-2-epochs": f"--epochs 2 --batch_size 4 {DECAY} --lora_r 16 --lora_alpha 16",
    "lora-own-rate-5e-4": "--epochs 1 --batch_size 2 --lora --learning_rate 5e-4",
}
"""The questions that instruction tuning with LoRA raises first, each a run; the last at a rate of LoRA's own."""

SEEDS = {
    f"{kind}-seed-{seed}": f"--epochs 2 --seed {seed} {flags}".rstrip()
    for seed in (0, 1, 2)
    for kind, flags in (("whole", ""), ("lora", "--lora"))
}
"""The defaults, whole and LoRA, three times each."""

RUNS = {**SEEDS, **GRID}

QUESTIONS = (
    "Rewrite the sentence using a simile.\n\nThe car is very fast.",
    "What type of cloud is typically associated with thunderstorms?",
    "Name the author of 'Pride and Prejudice'.",
    "Convert 45 kilometers to meters.",
)


def main() -> None:
    """Run what is missing, then write the page."""
    options = parse()
    files = divide(Path(options.data), Path(options.output))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine(), "runs": {}}
    if "untuned" not in results:
        results["untuned"] = {**held_out(options.model, files), "answers": answers(options.model)}
        keep(results)
    results["threads_a_run"] = threads = max(1, torch.get_num_threads() // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    missing = [name for name in options.only or RUNS if name not in results["runs"]]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(train, name, options.model, files, Path(options.output)): name for name in missing}
        for job in as_completed(jobs):
            results["runs"][jobs[job]] = job.result()
            keep(results)
    put_between(PAGE, BEGIN, tables(results), END)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the pretrained model's folder")
    parser.add_argument("--data", required=True, help="rows with instruction, input and output, in JSON")
    parser.add_argument("--output", default="runs/instruction-tuning", help="where the runs go")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="some of the runs")
    return parser.parse_args()


def divide(data: Path, output: Path) -> dict[str, Path]:
    """Write the rows of each part to a file of its own."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    train, test = int(len(rows) * 0.85), int(len(rows) * 0.1)
    parts = {"train": rows[:train], "test": rows[train : train + test], "validation": rows[train + test :]}
    output.mkdir(parents=True, exist_ok=True)
    files = {name: output / f"{name}.json" for name in parts}
    for name, part in parts.items():
        files[name].write_text(json.dumps(part, indent=1, ensure_ascii=False), encoding="utf-8")
    return files


def train(name: str, model: str, files: dict[str, Path], output: Path) -> dict[str, Any]:
    """One run, and how its best weights do on the test rows."""
    run = output / name
    where = f"--model {model} --data {files['train']} --val_data {files['validation']} --output {run}"
    facts = command(f"finetune {where} {COMMON} {RUNS[name]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("best_val_loss", "best_val_ppl", "best_step", "steps", "hours", "peak_memory_mb", "trainable_parameters")
    result = {
        "flags": RUNS[name],
        **{key: facts[key] for key in kept},
        "val_losses": [[record["step"], record["val_loss"]] for record in records if "val_loss" in record],
        "largest_grad_norm": max(record["grad_norm"] for record in records if "grad_norm" in record),
        "test": held_out(str(run), files)["test"],
    }
    if name in ("whole-seed-0", "lora-seed-0"):
        result["answers"] = answers(str(run))
    shutil.rmtree(run / "checkpoints")
    return result


def held_out(model: str, files: dict[str, Path]) -> dict[str, Any]:
    """Nats per answer token on validation and test rows, in float32."""
    result = {}
    for part in ("validation", "test"):
        template = "--chat_template chatml --max_seq_len 256"
        facts = command(f"evaluate --model {model} --data {files[part]} {template}")
        result[part] = facts["nats_per_token"]
    return result


def answers(model: str) -> list[str]:
    """What the model answers, always taking the likeliest token."""
    prompts = " ".join(f"--prompt {shlex.quote(question)}" for question in QUESTIONS)
    facts = command(f"generate --model {model} --chat --greedy --max_new_tokens 80 {prompts}")
    return [completion["text"] for completion in facts["completions"]]


def keep(results: dict[str, Any]) -> None:
    """Save after every run."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def tables(results: dict[str, Any]) -> str:
    """Markdown: the seeds and their means, then the grid, then the answers."""
    runs, untuned = results["runs"], results["untuned"]
    head = "| run | trained | validation loss | perplexity | test loss | minutes | peak memory |"
    rule = "|---|---|---|---|---|---|---|"
    loss, test = untuned["validation"], untuned["test"]
    first = f"| untuned | 0 | {loss:.3f} | {math.exp(loss):.2f} | {test:.3f} | | |"
    seeds = [row(name, runs[name]) for name in SEEDS if name in runs]
    grid = [row(name, runs[name]) for name in GRID if name in runs]
    parts = ["\n".join([head, rule, first, *seeds]), *means(runs), "\n".join([head, rule, *grid])]
    parts.append(
        "\n".join(["| run | flags |", "|---|---|", *(f"| {name} | `{flags}` |" for name, flags in RUNS.items())])
    )
    told = {"before": untuned["answers"]}
    told |= {kind: runs[f"{kind}-seed-0"]["answers"] for kind in ("whole", "lora") if f"{kind}-seed-0" in runs}
    for number, question in enumerate(QUESTIONS):
        lines = [f"**{' '.join(question.split())}**", ""]
        lines += [f"- {who}: {' '.join(texts[number].split())}" for who, texts in told.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def row(name: str, run: dict[str, Any]) -> str:
    """One line of a table."""
    return (
        f"| {name} | {run['trainable_parameters']:,} | {run['best_val_loss']:.3f} | {run['best_val_ppl']:.2f} | "
        f"{run['test']:.3f} | {60 * run['hours']:.1f} | {run['peak_memory_mb']:,.0f} MB |"
    )


def means(runs: dict[str, Any]) -> list[str]:
    """A sentence on the three seeds of each kind, once all are there."""
    losses: dict[str, Sequence[float]] = {
        kind: [runs[name]["best_val_loss"] for name in SEEDS if name.startswith(kind) and name in runs]
        for kind in ("whole", "lora")
    }
    if not all(len(some) == 3 for some in losses.values()):
        return []
    whole, lora = (f"{statistics.mean(losses[k]):.3f} ± {statistics.stdev(losses[k]):.3f}" for k in ("whole", "lora"))
    gap = statistics.mean(losses["lora"]) - statistics.mean(losses["whole"])
    return [f"Validation loss over three seeds: whole {whole}, LoRA {lora}; LoRA less whole: {gap:+.3f} nats."]


if __name__ == "__main__":
    main()
