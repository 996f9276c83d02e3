"""Ways to learn much from little text: how low the held-out loss gets, and how soon.

    python benchmarks/recipes.py --data texts [--epochs 20]

The preset `tiny` on half a megabyte of `wikitext-2-valid.txt`, its last tenth held out; figures go to
`benchmarks/results/recipes.json`, and a table is printed. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from commands import command, machine
from seedbed.runs.folder import read_records

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results" / "recipes.json"

TEXT: Final = "wikitext-2-valid.txt"
LEARNT, HELD_OUT = 0.45, 0.1  # shares of the text, from its beginning and its end
RECIPES: Final = {
    "`--model tiny`": "",
    "`--model tiny --optimizer muon`, 6e-3": "--optimizer muon --learning_rate 6e-3",
    "`--model tiny --config data-limited`": "--config data-limited",
}


def split(text: str, folder: Path) -> tuple[Path, Path]:
    """What is learnt and what is held out, as files, cut at lines."""
    learnt, held_out = text.rindex("\n", 0, int(LEARNT * len(text))), text.index("\n", int((1 - HELD_OUT) * len(text)))
    paths = folder / "learnt.txt", folder / "held-out.txt"
    for path, part in zip(paths, (text[:learnt], text[held_out:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def train(data: tuple[Path, Path], run: Path, epochs: int, more: str) -> dict[str, Any]:
    """One run's held-out losses, each with the minutes of training until then."""
    learnt, held_out = data
    flags = f"--tokenizer bpe --vocab_size 4000 --batch_size 8 --epochs {epochs} --early_stopping_patience 0"
    quiet = "--no_report --no_tensorboard --save_every 1000000 --sample_prompt ''"
    command(
        f"pretrain --model tiny --data '{learnt}' --val_data '{held_out}' --document blank_line {flags} {quiet} "
        f"{more} --output '{run}'"
    )
    records = [record for record in read_records(run / "metrics.jsonl") if "val_loss" in record]
    return {
        "epochs": [round(record["epoch"], 2) for record in records],
        "minutes": [round(60 * record["elapsed_hours"], 2) for record in records],
        "val_loss": [round(record["val_loss"], 4) for record in records],
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lowest losses, and when each recipe came below the first one's."""
    plain = min(next(iter(found.values()))["val_loss"])
    yield "| | lowest loss | in epoch | minutes of all epochs | minutes to the first one's lowest |"
    yield "|---|---:|---:|---:|---:|"
    for name, run in found.items():
        lowest = min(run["val_loss"])
        place = run["val_loss"].index(lowest)
        reached = [minutes for minutes, loss in zip(run["minutes"], run["val_loss"], strict=True) if loss <= plain]
        soonest = f"{reached[0]:.1f}" if reached else "never"
        yield f"| {name} | {lowest:.3f} | {run['epochs'][place]:.0f} | {run['minutes'][-1]:.1f} | {soonest} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"a folder with {TEXT}")
    parser.add_argument("--epochs", type=int, default=20)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = split((flags.data / TEXT).read_text(encoding="utf-8"), Path(folder))
        found = {
            name: train(data, Path(folder) / str(number), flags.epochs, more)
            for number, (name, more) in enumerate(RECIPES.items())
        }
    RESULTS.write_text(json.dumps({"machine": machine(), "recipes": found}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(table(found)) + "\n")


if __name__ == "__main__":
    main()
