"""What must not change: speed over an hour, speed with a thousand times the text, and memory that grows as it should.

    python benchmarks/endurance.py [--parts hour,text,memory] [--minutes 60] [--repeats 5]

Figures go to `benchmarks/results/endurance.json`, tables into `docs/performance.md`. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from commands import command, machine, put_between
from seedbed.data.python_docs import python_docs
from seedbed.runs.folder import read_records

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results" / "endurance.json"
PAGE: Final = ROOT / "docs" / "performance.md"

WARM: Final = 5  # steps that are not counted
TEXTS: Final = {"2 MB": 2_000_000, "2 GB": 2_000_000_000}
PIECES: Final = 6  # of the hour
CONTEXTS: Final = (128, 256, 512, 1024)
BATCHES: Final = (1, 2, 4, 8)
MODEL: Final = "--arch llama --d_model 256 --num_layers 4 --num_heads 4"
QUIET: Final = "--no_report --no_tensorboard --val_split 0 --eval_every 1000000 --save_every 1000000"


def write_text(path: Path, size: int) -> None:
    """Documentation of Python, over and over, each document with a number of its own."""
    documents = python_docs()
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            text = f"{written}\n{documents[written % len(documents)]}".replace("\n\n", "\n")
            written += stream.write(f"{text}\n\n")


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run's steps that are counted."""
    return [record for record in read_records(run / "metrics.jsonl") if "train_loss" in record][WARM:]


def speeds(run: Path) -> Sequence[float]:
    return [record["tokens_per_second"] for record in steps_of(run)]


def train(data: Path, run: Path, more: str) -> dict[str, Any]:
    """One run, and its summary."""
    return command(f"pretrain --data '{data}' --document blank_line {MODEL} {QUIET} {more} --output '{run}'")


def text(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and memory with each text, by turns; the first run of each also tokenizes it."""
    found: dict[str, Any] = {name: {"tokens_per_second": [], "memory_mb": []} for name in TEXTS}
    for name, size in TEXTS.items():
        write_text(folder / name, size)
    tokenizer = "bpe --vocab_size 4000"
    for number in range(flags.repeats):
        for name in TEXTS:
            run = folder / f"{name}-{number}"
            options = f"--tokenizer {tokenizer} --max_seq_len 256 --batch_size 8 --max_steps 60"
            summary = train(folder / name, run, options)
            found[name]["tokens_per_second"].append(statistics.median(speeds(run)))
            found[name]["memory_mb"].append(summary["peak_memory_mb"])
            tokenizer = f"'{folder / next(iter(TEXTS))}-0/tokenizer'"
    return found


def hour(folder: Path, flags: argparse.Namespace) -> list[dict[str, float]]:
    """Tokens a second and memory in each sixth of a long run."""
    write_text(folder / "text", TEXTS["2 MB"])
    run = folder / "long"
    hours = flags.minutes / 60
    options = f"--vocab_size 4000 --max_seq_len 256 --batch_size 8 --max_steps 1000000 --max_training_hours {hours}"
    train(folder / "text", run, f"{options} --epochs 100000")
    records = steps_of(run)
    pieces = [records[len(records) * n // PIECES : len(records) * (n + 1) // PIECES] for n in range(PIECES)]
    return [
        {
            "minutes": round(60 * piece[-1]["elapsed_hours"], 1),
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in piece),
            "memory_mb": max(record["memory_mb"] for record in piece),
        }
        for piece in pieces
    ]


def memory(folder: Path, _flags: argparse.Namespace) -> list[dict[str, float]]:
    """Most memory of short runs, and what was forecast, over contexts and batches."""
    write_text(folder / "text", TEXTS["2 MB"])
    found = []
    for context, batch in _sizes():
        run = folder / f"{context}-{batch}"
        options = f"--vocab_size 4000 --max_seq_len {context} --batch_size {batch} --max_steps 6"
        summary = train(folder / "text", run, options)
        found.append(
            {
                "context": context,
                "batch": batch,
                "memory_mb": summary["peak_memory_mb"],
                "forecast_mb": summary["forecast"]["peak_memory_mb"],
            }
        )
    return found


def _sizes() -> Iterator[tuple[int, int]]:
    yield from ((context, 4) for context in CONTEXTS)
    yield from ((256, batch) for batch in BATCHES if batch != 4)


def text_table(found: dict[str, Any]) -> Iterator[str]:
    yield "| text | tokens/s (least to most) | memory (MB) |"
    yield "|---|---:|---:|"
    for name, row in found.items():
        speed = row["tokens_per_second"]
        middle = f"{statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})"
        yield f"| {name} | {middle} | {statistics.median(row['memory_mb']):,.0f} |"


def hour_table(found: list[dict[str, float]]) -> Iterator[str]:
    yield "| up to minute | tokens/s | memory (MB) |"
    yield "|---:|---:|---:|"
    for row in found:
        yield f"| {row['minutes']:.0f} | {row['tokens_per_second']:,.0f} | {row['memory_mb']:,.0f} |"


def memory_table(found: list[dict[str, float]]) -> Iterator[str]:
    yield "| context | batch | tokens at once | memory (MB) | forecast (MB) |"
    yield "|---:|---:|---:|---:|---:|"
    for row in sorted(found, key=lambda row: (row["context"] * row["batch"], row["context"])):
        at_once = row["context"] * row["batch"]
        figures = f"{row['memory_mb']:,.0f} | {row['forecast_mb']:,.0f}"
        yield f"| {row['context']:,} | {row['batch']} | {at_once:,} | {figures} |"


PARTS: Final[dict[str, tuple[Callable[..., Any], Callable[[Any], Iterator[str]]]]] = {
    "hour": (hour, hour_table),
    "text": (text, text_table),
    "memory": (memory, memory_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in flags.parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[part] = PARTS[part][0](Path(folder), flags)
        results["machine"] = machine()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = ["\n".join(table(results[part])) for part, (_, table) in PARTS.items() if part in results]
    put_between(PAGE, "<!-- endurance -->", "\n\n".join(tables), "<!-- end of endurance -->")


if __name__ == "__main__":
    main()
