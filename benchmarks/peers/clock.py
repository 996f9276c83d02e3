"""When the steps of a transformers Trainer end, for all scripts that use one."""

from __future__ import annotations

from typing import Any

from steps import Steps
from transformers import Trainer, TrainerCallback


class Clock(TrainerCallback):
    """Notes the end of each step."""

    def __init__(self, steps: Steps, tokens: int = 0) -> None:
        self.steps, self.tokens = steps, tokens

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.done(self.tokens, None)


def last_loss(trainer: Trainer) -> float:
    """Of the last step that was logged."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1])
