"""Whether the fast paths learn what plain float32 learns: the same 200 steps in each, and the loss at their end."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import replace
from typing import Final

from commands import command
from contenders import Place, Shape

EQUALITY: Final = "equality"
STEPS: Final = 200
LIMIT: Final = 0.02
"""Nats of validation loss that a fast path may be away from plain float32."""

WAYS: Final = {"float32": "--precision fp32", "default": "", "default, `--compile`": "--compile"}


def compare_losses(place: Place) -> dict[str, dict[str, dict[str, float]]]:
    """Shape to way to the loss of the last step and of the held-out text, in nats a token."""
    two_layers = replace(place.gpt2(), layers=2, context=128)
    shapes = {"6 layers × 384, characters": place.char(), "2 layers × 768, GPT-2's vocabulary": two_layers}
    return {name: {way: losses(place, shape, flags) for way, flags in WAYS.items()} for name, shape in shapes.items()}


def losses(place: Place, shape: Shape, flags: str) -> dict[str, float]:
    """Of one run: at its last step, and of the held-out text after it."""
    words = shlex.join(["pretrain", *place.texts(), *shape.seedbed_flags()])
    with tempfile.TemporaryDirectory() as folder:
        facts = command(f"{words} {flags} --max_steps {STEPS} --eval_every {STEPS} --output {folder}/run")
    return {"train_loss": facts["train_loss"], "val_loss": facts["best_val_loss"]}


def furthest(ways: dict[str, dict[str, float]]) -> float:
    """The largest distance of a way's validation loss from that of float32, in nats a token."""
    plain = ways["float32"]["val_loss"]
    return max(abs(way["val_loss"] - plain) for way in ways.values())
