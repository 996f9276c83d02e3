"""What a checkpoint of a gigabyte costs: its save, the digests in it, the copy of `--async_save`, and loading it again.

    python benchmarks/saving.py [--folder WHERE] [--repeats 30]

Figures go to `benchmarks/results/saving.json`, a table into `docs/reliability.md`. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from commands import machine, put_between
from seedbed import checkpoint
from seedbed.checkpoint import load_model, read_optimizer, save_checkpoint
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.text.tokenizer import train_char
from seedbed.train.saving import Snapshot

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results" / "saving.json"
PAGE: Final = ROOT / "docs" / "reliability.md"


def seconds(work: Callable[[], object]) -> float:
    """How long that takes on a disk that has nothing left to do: what was deleted last would slow it."""
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def gigabyte() -> Decoder:
    """A model whose weights and moments take about that."""
    return Decoder(from_scratch("llama", vocab_size=1000, d_model=768, num_layers=12, num_heads=12, max_seq_len=512))


def without_digests() -> Any:
    return mock.patch.object(checkpoint, "sha256_of", lambda _path: "0" * 64)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    model, tokenizer = gigabyte(), train_char(["abc"])
    optimizer = {f"{name}/{key}": torch.zeros_like(p) for name, p in model.named_parameters() for key in ("a", "b")}
    rows: dict[str, list[float]] = {"save": [], "save without digests": [], "copy": [], "load": []}
    where = folder / "checkpoint"
    ways: dict[str, Any] = {"save": contextlib.nullcontext(), "save without digests": without_digests()}
    for number in range(repeats):
        for name in sorted(ways, reverse=bool(number % 2)):
            with ways[name]:
                rows[name].append(seconds(lambda: save_checkpoint(where, model, tokenizer, optimizer, {})))
        save_checkpoint(where, model, tokenizer, optimizer, {})
        rows["load"].append(seconds(lambda: (load_model(where), dict(read_optimizer(where)))))
        rows["copy"].append(seconds(Snapshot(model, optimizer, {}).copied))
    size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
    return {"machine": machine(), "gigabytes": round(size / 1e9, 3), "seconds": rows}


def table(found: dict[str, Any]) -> str:
    tries = found["seconds"]
    middle = {name: statistics.median(values) for name, values in tries.items()}
    size = found["gigabytes"]
    digests = middle["save"] / middle["save without digests"] - 1
    lines = [
        f"| a checkpoint of {size:.2f} GB, {len(found['seconds']['save'])} times | seconds, median (least to most) |",
        "|---|---:|",
        *(f"| {name} | {middle[name]:.2f} ({min(all_):.2f} to {max(all_):.2f}) |" for name, all_ in tries.items()),
        "",
        f"Digests change the median of a save by {digests:+.1%}; loading, every byte checked, goes at "
        f"{size / middle['load']:.1f} GB/s.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=30)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        found = measure(Path(folder), flags.repeats)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put_between(PAGE, "<!-- figures -->", table(found), "<!-- end of figures -->")


if __name__ == "__main__":
    main()
