"""What went wrong in a run, from its folder alone: small rules, each with its evidence and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from seedbed.findings import Finding
from seedbed.runs.diagnose.facts import Facts, read_facts
from seedbed.runs.diagnose.holdout import forgetting, overfitting, train_validation_mismatch, worse_than_parent
from seedbed.runs.diagnose.inputs import padding, repetition, short_context, slow_input
from seedbed.runs.diagnose.progress import (
    learning_rate_too_low,
    lora_capacity,
    plateau,
    stopped_too_soon,
    under_training,
)
from seedbed.runs.diagnose.spikes import loss_spike
from seedbed.runs.diagnose.stability import (
    clipping,
    divergence,
    learning_rate_too_high,
    long_warmup,
    nan,
    no_warmup,
)

__all__ = ["LIVE", "NAMES", "RULES", "diagnose", "find", "read_facts"]

RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    learning_rate_too_high,
    nan,
    divergence,
    loss_spike,
    no_warmup,
    long_warmup,
    learning_rate_too_low,
    plateau,
    lora_capacity,
    overfitting,
    under_training,
    stopped_too_soon,
    train_validation_mismatch,
    worse_than_parent,
    forgetting,
    short_context,
    slow_input,
    clipping,
    padding,
    repetition,
)
"""Each looks at the facts and yields one finding, which has the rule's name, or nothing."""

NAMES = tuple(rule.__name__ for rule in RULES)

LIVE = frozenset({"nan", "divergence", "loss_spike", "learning_rate_too_high", "slow_input"})
"""What is worth saying while a run goes."""

_CONSEQUENCES = {
    "learning_rate_too_high": (
        "loss_spike", "no_warmup", "plateau", "under_training", "clipping", "repetition", "train_validation_mismatch",
    ),
    "nan": ("loss_spike", "no_warmup", "plateau", "under_training", "clipping"),
    "divergence": ("loss_spike", "plateau", "under_training", "clipping", "train_validation_mismatch"),
    "learning_rate_too_low": ("plateau", "under_training", "lora_capacity", "repetition"),
    "lora_capacity": ("plateau",),
    "overfitting": ("under_training", "plateau"),
}  # fmt: skip
"""What a cause explains, and what is not said beside it."""

_LEVELS = ("error", "warning", "note")


def diagnose(run: Path | str) -> list[Finding]:
    """What is to be said of a run or of the run around a checkpoint: errors first, then warnings, then notes.

    Raises:
        ConfigError: no such folder, or it holds no run.
    """
    return find(read_facts(run))


def find(facts: Facts) -> list[Finding]:
    """The same of facts that were read already."""
    found = [finding for rule in RULES for finding in rule(facts)]
    explained = {effect for finding in found for effect in _CONSEQUENCES.get(finding.name, ())}
    causes = [finding for finding in found if finding.name not in explained]
    return sorted(causes, key=lambda finding: _LEVELS.index(finding.level))
