"""What holding on to the old costs: seconds a token of each method against plain training, steps in turns.

    python benchmarks/continual_cost.py --model FOLDER --data new.txt --general_data old.txt

All jobs are in one process and take their updates in turns, so that whatever else the machine does meets all alike.
Results go to benchmarks/results/continual_cost.json and are printed as a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from commands import machine
from seedbed.config import Layer, resolve
from seedbed.train.build import build_job
from seedbed.train.job import Job
from seedbed.train.progress import Display
from seedbed.train.resume import Start, open_run
from seedbed.train.step import take_step

RESULTS = Path(__file__).parent / "results/continual_cost.json"

METHODS: dict[str, dict[str, Any]] = {
    "naive": {"method": "naive"},
    "replay 5 %": {"replay": 0.05},
    "self-replay": {"self_replay": 0.1},
    "L2-SP": {"l2_sp": 0.05},
    "EWC": {"ewc": 10.0},
    "KL": {"kl": 0.3},
    "replay 5 % + L2-SP": {"replay": 0.05, "l2_sp": 0.01},
    "LoRA": {"method": "naive", "lora": True},
    "last blocks": {"method": "naive", "last_blocks": 15},
}
AT_ONCE = 3
"""Jobs in memory beside the naive one."""


def main() -> None:
    """Measure, keep, print."""
    options = parse()
    others = [name for name in METHODS if name in options.methods and name != "naive"]
    table: dict[str, dict[str, Any]] = {}
    for first in range(0, len(others), AT_ONCE):
        table |= in_turns(["naive", *others[first : first + AT_ONCE]], options)
    facts = {"machine": machine(), **vars(options), "by_method": table}
    facts |= {"model": Path(options.model).name, "data": Path(options.data).name}
    facts |= {"general_data": Path(options.general_data).name}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name, row in table.items():
        low, high = row["middle_half_of_ratios"]
        time_a_token = f"{row['microseconds_a_token']:>9} us a token"
        print(f"{name:<20} {time_a_token}   x{row['against_naive']:.3f}   ({low:.3f} to {high:.3f})")  # noqa: T201


def in_turns(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each of some methods costs, their updates made in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: job(name, options, Path(folder)) for name in names}
        for turn in range(options.warmup + options.steps):
            for name, one in jobs.items():
                began = time.perf_counter()
                result = take_step(one, 0.0)
                one.state.step += 1
                if turn >= options.warmup:
                    seconds[name].append((time.perf_counter() - began) / result.tokens)
    # Neighbours in time share what disturbs them, so their ratios spread less than the times.
    ratios = {
        name: [t / naive for t, naive in zip(some, seconds["naive"], strict=True)] for name, some in seconds.items()
    }
    return {
        name: {
            "microseconds_a_token": round(1e6 * statistics.median(seconds[name]), 1),
            "against_naive": round(statistics.median(some), 4),
            "middle_half_of_ratios": [round(quartile, 4) for quartile in statistics.quantiles(some, n=4)[::2]],
        }
        for name, some in ratios.items()
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--general_data", required=True)
    parser.add_argument("--max_seq_len", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    return parser.parse_args()


def job(name: str, options: argparse.Namespace, folder: Path) -> Job:
    """A run of one method, ready for its first update."""
    given = {"model": options.model, "data": options.data, "general_data": options.general_data, "domain": "new"}
    given |= {"tensorboard": False}
    steps = options.warmup + options.steps
    sizes = {"max_seq_len": options.max_seq_len, "batch_size": options.batch_size, "max_steps": steps}
    output = {"output": str(folder / name)}
    config = resolve("continue", [Layer("the benchmark", {**given, **sizes, **output, **METHODS[name]})])
    start = open_run(config)
    assert isinstance(start, Start)
    return build_job(start, Display(Console(stderr=True), log_every=100))


if __name__ == "__main__":
    main()
