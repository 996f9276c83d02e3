"""What can be trained, and what depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from seedbed.config.options import (
    AdaptOptions,
    DataOptions,
    KeepOptions,
    ModelOptions,
    PretrainedOptions,
    Section,
    TrainingOptions,
    WatchOptions,
)


@dataclass(frozen=True)
class Regime:
    """Training of one kind: from scratch, of pretrained weights or of adapters on them."""

    doing: str
    """In messages."""
    title: str
    """The first line of a run."""
    defaults: Mapping[str, Any]
    """Values that differ between regimes: a rate of 3e-4 suits a new model and ruins a pretrained one."""
    learning_rates: tuple[float, float]
    """The least and the greatest peak of AdamW that usually goes well."""
    sections: tuple[type[Section], ...]
    """The options that mean something."""
    with_lora: bool = False
    """Whether adapters are trained, beside frozen weights."""
    continues: bool = False
    """Whether a domain is added to what a model knows."""


_SCRATCH = {
    "tokenizer": "bpe",
    "max_seq_len": 256,
    "model": "small",
    "epochs": 3,
    "learning_rate": 3e-4,
    "min_lr": 0.0,
    "warmup_ratio": 0.05,
    "weight_decay": 0.01,
}
_FINETUNE = {
    "tokenizer": None,
    "max_seq_len": 512,
    "model": "",
    "epochs": 3,
    "learning_rate": 2e-5,
    "min_lr": 1e-6,
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
}
_ADAPTERS = _FINETUNE | {"learning_rate": 2e-4, "min_lr": 1e-5}

_ADAPTING = (DataOptions, PretrainedOptions, AdaptOptions, TrainingOptions, WatchOptions)
_CONTINUING = (DataOptions, PretrainedOptions, KeepOptions, AdaptOptions, TrainingOptions, WatchOptions)

REGIMES: Final = {
    "scratch": Regime(
        "training from scratch",
        "Pre-training a language model",
        _SCRATCH,
        (1e-4, 5e-3),
        (DataOptions, ModelOptions, TrainingOptions, WatchOptions),
    ),
    "finetune": Regime(
        "fine-tuning pretrained weights", "Fine-tuning a language model", _FINETUNE, (1e-5, 5e-5), _ADAPTING
    ),
    "lora": Regime(
        "training LoRA adapters",
        "Fine-tuning a language model with LoRA",
        _ADAPTERS,
        (5e-5, 5e-4),
        _ADAPTING,
        with_lora=True,
    ),
    "continue": Regime(
        "continuing pretrained weights",
        "Adding a domain to a language model",
        _FINETUNE,
        (1e-5, 5e-5),
        _CONTINUING,
        continues=True,
    ),
    "continue-lora": Regime(
        "training LoRA adapters",
        "Adding a domain to a language model with LoRA",
        _ADAPTERS,
        (5e-5, 5e-4),
        _CONTINUING,
        with_lora=True,
        continues=True,
    ),
}

WITH_LORA: Final = {"finetune": "lora", "continue": "continue-lora"}
"""What a regime becomes with `--lora`."""


def option_names(regime: str) -> list[str]:
    """Names of the options of a regime, in the order they are documented."""
    return [name for section in REGIMES[regime].sections for name in section.model_fields]


def rate_range(regime: str, trained_at: float | None = None) -> tuple[float, float]:
    """The least and the greatest peak rate of AdamW that usually goes well.

    trained_at: the rate of the run that made the model, where it was made here; what continues it takes that one again.
    """
    return (trained_at / 50, trained_at) if regime == "continue" and trained_at else REGIMES[regime].learning_rates
