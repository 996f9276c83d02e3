"""A `seedbed` training command as a user types it, timed by the records it appends to its run folder.

    python seedbed_train.py --warm_up 2 --timed 4 -- pretrain --data book.txt --model gpt2

A record is written when its step is done. The command is ended after the last step that is wanted, before it measures
or saves anything. Records count the targets of the loss; `seedbed data show` tells how many tokens conversations have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from steps import Steps

PAUSE = 0.005  # seconds between two looks


def records(run: Path, command: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The records of a run that goes on, each as soon as it is there."""
    file = run / "metrics.jsonl"
    while not file.exists():
        require_alive(command)
        time.sleep(PAUSE)
    with file.open(encoding="utf-8") as lines:
        while True:
            if line := lines.readline():
                yield json.loads(line)
            else:
                require_alive(command)
                time.sleep(PAUSE)


def require_alive(command: subprocess.Popen[bytes]) -> None:
    if command.poll() is not None:
        sys.exit(f"seedbed ended with exit code {command.returncode} before the last step")


def real_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row before its padding: the last of them predicts the end of the last answer."""
    return max(place for place, label in enumerate(row["labels"]) if label != -100) + 1


def shown_rows(data: str, model: str, max_seq_len: int, num: int) -> list[dict[str, Any]]:
    """The first rows of the first epoch, as the run reads them."""
    command = [sys.executable, "-m", "seedbed", "data", "show", "--json", "--data", data, "--model", model]
    command += ["--max_seq_len", str(max_seq_len), "--num", str(num)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(shown.stdout)["examples"]
    return found


def tokens_of_steps(words: Sequence[str], count: int) -> list[int]:
    """Real tokens of each of the first steps of a command on conversations."""
    given = dict(pairwise(words))
    batch = int(given["--batch_size"])
    rows = shown_rows(given["--data"], given["--model"], int(given["--max_seq_len"]), count * batch)
    sizes = [real_tokens(row) for row in rows]
    return [sum(sizes[first : first + batch]) for first in range(0, len(sizes), batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--timed", type=int, default=4)
    parser.add_argument("--conversations", action="store_true", help="count all tokens, not only those of answers")
    parser.add_argument("words", nargs="+", help="of the command")
    flags = parser.parse_args()
    steps, count = Steps(flags.warm_up), flags.warm_up + flags.timed
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [sys.executable, "-m", "seedbed", *flags.words, "--max_steps", str(count), "--output", str(run)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as command:
            learnt = 0
            for record in records(run, command):
                steps.done(record["tokens"] - learnt, record["train_loss"])
                learnt = record["tokens"]
                if len(steps.ends) == count:
                    break
            command.kill()
        summary = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    if flags.conversations:
        steps.tokens = tokens_of_steps(flags.words, count)
    steps.report(precision=summary["precision"], parameters=summary["parameters"])


if __name__ == "__main__":
    main()
