"""How training scales: two processes against one on this machine, measured; up to 1,024 GPUs, worked out.

    python benchmarks/scaling.py [--measure] [--repeats 3]

`--measure` trains for real, on a machine that should do nothing else; figures go to `benchmarks/results/scaling.json`.
The tables of `docs/scaling.md` are made from them and from `seedbed.train.estimate.scaling`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from commands import machine, put_between
from seedbed.data.python_docs import python_docs
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.decoder import num_parameters
from seedbed.runs.folder import read_records
from seedbed.train.estimate.scaling import LINKS, Exchange

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE: Final = ROOT / "docs" / "scaling.md"

STEPS: Final = 24
WARM: Final = 8  # steps that are not counted
ROWS: Final = 8  # of one process
MODEL: Final = "--arch llama --d_model 384 --num_layers 6 --num_heads 6 --max_seq_len 256 --vocab_size 8000"
WAYS: Final = {"one process": (1, "auto"), "two, DDP": (2, "ddp"), "two, FSDP": (2, "fsdp")}

# Published single-GPU speed: llm.c, GPT-2 124M on one H100 in bf16, 468,000 tokens/s; its share of the arithmetic is
# assumed for the other sizes.
TOKENS_PER_SECOND: Final = 468_000
GPU_MEMORY: Final = 80e9
GPUS: Final = (1, 8, 64, 256)
MANY_GPUS: Final = (64, 256, 1024)
GPUS_PER_NODE: Final = 8
CONTEXT: Final = 1024
STEP_ROWS: Final = 512  # of all GPUs together: half a million tokens
GPU_ROWS: Final = 16  # of each GPU, where a step grows with their number
MICRO_BATCH: Final = 16  # the most rows at once
SIZES: Final = {  # width, layers, heads, d_ff, vocabulary
    "124M": ("gpt2", 768, 12, 12, 3072, 50257),
    "355M": ("gpt2", 1024, 24, 16, 4096, 50257),
    "774M": ("gpt2", 1280, 36, 20, 5120, 50257),
    "1.5B": ("gpt2", 1600, 48, 25, 6400, 50257),
    "3B": ("llama", 2560, 32, 32, 8960, 50257),
    "8B": ("llama", 4096, 32, 32, 14336, 128256),
}


def measure(repeats: int) -> dict[str, Any]:
    """Tokens a second of each way, one thread a process, by turns."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n\n".join(python_docs())[:2_000_000], encoding="utf-8")
        for number in range(repeats):
            for name, (processes, parallel) in WAYS.items():
                run = Path(folder) / f"{processes}-{parallel}-{number}"
                found[name].append(tokens_per_second(text, run, processes, parallel))
                sys.stderr.write(f"{name}: {found[name][-1]:,.0f} tokens/s\n")
    return {"machine": machine(), "model": MODEL, "rows": ROWS, "tokens_per_second": found}


def tokens_per_second(text: Path, run: Path, processes: int, parallel: str) -> float:
    """The median step's, of all processes together."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = f"--batch_size {ROWS} --max_steps {STEPS} --parallel {parallel} --no_tensorboard --no_report".split()
    more = ["--val_split", "0", "--device", "cpu", "--data", str(text), "--output", str(run)]
    command = [sys.executable, *torchrun, "-m", "seedbed", "pretrain", *MODEL.split(), *options, *more]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    speeds: list[float] = [record["tokens_per_second"] for record in read_records(run / "metrics.jsonl")]
    return statistics.median(speeds[WARM:])


def measured_table(results: dict[str, Any]) -> str:
    lines = ["| | tokens/s, median (least to most) | against one |", "|---|---|---|"]
    one = statistics.median(results["tokens_per_second"]["one process"])
    for name, speeds in results["tokens_per_second"].items():
        middle = statistics.median(speeds)
        lines.append(f"| {name} | {middle:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) | {middle / one:.2f} x |")
    where = results["machine"]
    return "\n".join(
        [*lines, "", f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {len(speeds)} rounds."]
    )


def shape(name: str) -> DecoderConfig:
    family, width, layers, heads, d_ff, vocabulary = SIZES[name]
    return from_scratch(
        family,
        vocab_size=vocabulary,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        d_ff=d_ff,
        max_seq_len=CONTEXT,
        tie_embeddings=family == "gpt2",
    )


def flops_per_token(parameters: float, config: DecoderConfig) -> float:
    """Forward and back: 6 a weight, and attention over half the context (Kaplan et al., 2020)."""
    return 6 * parameters + 6 * config.num_layers * config.d_model * CONTEXT


def simulated(name: str, gpus: int, rows: int) -> dict[str, Any]:
    """One H100 of so many, with so many rows a step: memory, bytes sent, the share of its speed that it keeps."""
    at_once = min(rows, MICRO_BATCH)
    config = shape(name)
    parameters = float(num_parameters(config))
    smallest = shape("124M")
    rate = TOKENS_PER_SECOND * flops_per_token(num_parameters(smallest), smallest)  # arithmetic a second
    seconds = rows * CONTEXT * flops_per_token(parameters, config) / rate
    link = LINKS["NVLink 4"] if gpus <= GPUS_PER_NODE else LINKS["400 Gb/s InfiniBand"]
    # Blocks computed twice: one float32 residual between two, and in the one at work some 34 numbers of two bytes.
    kept = at_once * CONTEXT * config.d_model * (4 * config.num_layers + 2 * 34)
    whole = 16 * parameters + kept
    block = (parameters - config.vocab_size * config.d_model) / config.num_layers
    ends = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    part = 16 * parameters / gpus + 2 * 2 * block + 4 * block + 8 * ends + kept
    exchange = Exchange(parameters, parameters, gpus, rows // at_once, product_bytes=2, units=config.num_layers + 1)
    ways = {"DDP": (whole, exchange.ddp(seconds)), "FSDP": (part, exchange.fsdp(seconds))}
    found = {}
    for way, (memory, traffic) in ways.items():
        efficiency = traffic.efficiency(link)
        found[way] = {
            "memory_gb": memory / 1e9,
            "sent_gb": traffic.num_bytes / 1e9,
            "efficiency": efficiency,
            "tokens_per_second": gpus * rows * CONTEXT * efficiency / seconds,
        }
    fitting = [way for way in found if found[way]["memory_gb"] * 1e9 < 0.9 * GPU_MEMORY]
    best = max(fitting, key=lambda way: found[way]["efficiency"], default=None)
    return {"ways": found, "best": best, "rows": rows}


def simulated_table(counts: Sequence[int], rows_of_each: Callable[[int], int]) -> str:
    lines = [
        "| model | GPUs | rows of each | DDP: GB, sent, kept | FSDP: GB, sent, kept | best | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, gpus in itertools.product(SIZES, counts):
        row = simulated(name, gpus, rows_of_each(gpus))
        cells = [
            f"{way['memory_gb']:.0f}, {way['sent_gb']:.1f}, {way['efficiency']:.0%}" for way in row["ways"].values()
        ]
        speed = f"{row['ways'][row['best']]['tokens_per_second']:,.3g}" if row["best"] else ""
        best = row["best"] or "does not fit"
        lines.append(f"| {name} | {gpus:,} | {row['rows']:,} | {' | '.join(cells)} | {best} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train for real first")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of it")
    given = parser.parse_args()
    if given.measure:
        RESULTS.write_text(json.dumps(measure(given.repeats), indent=2) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    put_between(PAGE, "<!-- measured -->", measured_table(results), "<!-- end of measured -->")
    same_step = simulated_table(GPUS, lambda gpus: STEP_ROWS // gpus)
    put_between(PAGE, "<!-- simulated -->", same_step, "<!-- end of simulated -->")
    growing_step = simulated_table(MANY_GPUS, lambda _gpus: GPU_ROWS)
    put_between(PAGE, "<!-- growing -->", growing_step, "<!-- end of growing -->")


if __name__ == "__main__":
    main()
