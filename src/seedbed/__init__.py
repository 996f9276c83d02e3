"""seedbed grows small language models on the machine you have, and says what is going wrong.

The names below are the public ones; they are loaded when first used, so that `import seedbed` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seedbed.api import LanguageModel, Run, Trainer, continue_training, finetune, load, pretrain
    from seedbed.errors import SeedbedError
    from seedbed.evaluate import Evaluation

__version__ = "0.1.0"

_HOMES = {
    "Evaluation": "seedbed.evaluate",
    "LanguageModel": "seedbed.api",
    "Run": "seedbed.api",
    "SeedbedError": "seedbed.errors",
    "Trainer": "seedbed.api",
    "continue_training": "seedbed.api",
    "finetune": "seedbed.api",
    "load": "seedbed.api",
    "pretrain": "seedbed.api",
}

__all__ = [
    "Evaluation",
    "LanguageModel",
    "Run",
    "SeedbedError",
    "Trainer",
    "continue_training",
    "finetune",
    "load",
    "pretrain",
]


if not TYPE_CHECKING:  # which would take any name for one

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'seedbed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
