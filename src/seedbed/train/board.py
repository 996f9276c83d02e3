"""TensorBoard: loss, learning rate and perplexity of training; loss and perplexity of validation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

_TAGS = {
    "train_loss": "train/loss",
    "train_ppl": "train/perplexity",
    "lr": "train/learning_rate",
    "grad_norm": "train/gradient_norm",
    "tokens_per_second": "train/tokens_per_second",
    "val_loss": "validation/loss",
    "val_ppl": "validation/perplexity",
}


class Board:
    """Writes points into `folder`, or nowhere when it is None; points after `step` are forgotten."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Points of a step; on a full disk TensorBoard's writer dies, and the run goes on without it."""
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                kind, _, domain = name.partition("/")  # val_loss/DOMAIN: of something known earlier
                if kind in _TAGS:
                    self._writer.add_scalar(f"{_TAGS[kind]}/{domain}".rstrip("/"), value, step)
            self._writer.flush()
        except OSError:
            self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
