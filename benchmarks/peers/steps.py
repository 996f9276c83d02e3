"""What the contenders share: the flags of a training job, and the line of JSON that each prints at its end.

Imports nothing beyond Python and torch: it runs in the environment of seedbed and in that of the peers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0


@dataclass
class Steps:
    """When each step ended, the tokens it trained on, and its loss."""

    warm_up: int
    ends: list[float] = field(default_factory=list)  # seconds since 1970, which the driver can set against its own
    tokens: list[int] = field(default_factory=list)
    loss: float | None = None

    def done(self, tokens: int, loss: float | None) -> None:
        """Note that a step ends now."""
        self.ends.append(time.time())
        self.tokens.append(tokens)
        self.loss = loss

    def tokens_per_second(self) -> float:
        """Of the steps after the warm-up: the median step where all are equally large, else all of them together."""
        seconds = [later - earlier for earlier, later in pairwise(self.ends[self.warm_up - 1 :])]
        tokens = self.tokens[self.warm_up :]
        if len(set(tokens)) == 1:
            return tokens[0] / statistics.median(seconds)
        return sum(tokens) / sum(seconds)

    def report(self, **more: object) -> None:
        """Print what the driver reads: the last line of the output."""
        speed = self.tokens_per_second() if len(self.ends) > self.warm_up else None
        facts = {"speed": speed, "first_step_at": self.ends[0], "final_loss": self.loss, "steps": len(self.ends)}
        sys.stdout.write(json.dumps(facts | more) + "\n")


def report_speed(speed: float) -> None:
    """Print what the driver reads of a contender that does not train."""
    sys.stdout.write(json.dumps({"speed": speed}) + "\n")


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of a model trained from scratch on a file of tokens."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="token ids, uint16")
    for name in ("vocab_size", "layers", "heads", "width", "context", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--warm_up", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--timed", type=int, default=4, help="steps that are timed")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; else float32")
    parser.add_argument("--compile", action="store_true")
    return parser


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of greedy texts written after prompts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="where the prompts are taken from")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--timed", type=int, default=3)
    return parser


def rows(tokens: Path, length: int, count: int) -> Tensor:
    """The first rows of a file of tokens, (count, length)."""
    import numpy as np
    import torch

    ids = np.fromfile(tokens, dtype=np.uint16, count=count * length).astype(np.int64)
    return torch.from_numpy(np.resize(ids, (count, length)))


def timed_steps(flags: argparse.Namespace) -> int:
    """Steps in all: those before the timed ones, too."""
    return int(flags.warm_up + flags.timed)


def passages(path: Path, count: int, characters: int = 200) -> Sequence[str]:
    """Beginnings to continue, spread over a text: each starts at a paragraph."""
    paragraphs = [part for part in path.read_text(encoding="utf-8").split("\n\n") if len(part) >= characters]
    return [paragraphs[len(paragraphs) * place // count][:characters] for place in range(count)]
