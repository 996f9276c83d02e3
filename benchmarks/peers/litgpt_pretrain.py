"""litgpt's own `pretrain` on a CPU, which always compiles; it prints a line a step, for watch.py to time.

Its models have no learned positions: rotary ones stand in for them, all else is GPT-2's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from steps import BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, rows, timed_steps, training_parser
from torch.utils.data import DataLoader


class Rows(DataModule):  # type: ignore[misc]
    """Rows of a file of tokens, (T + 1,) each."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.batch_size = 1

    def connect(self, batch_size: int, **_: Any) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(self.data, batch_size=self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(self.data[: self.batch_size], batch_size=self.batch_size)  # type: ignore[arg-type]


def main() -> None:
    flags = training_parser(__doc__).parse_args()
    count = timed_steps(flags)
    config = Config(
        name="gpt2-shape",
        block_size=flags.context,
        vocab_size=flags.vocab_size,
        padded_vocab_size=flags.vocab_size,
        n_layer=flags.layers,
        n_head=flags.heads,
        n_embd=flags.width,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=True,
        attn_bias=True,
        gelu_approximate="tanh",
    )
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": flags.learning_rate, "betas": BETAS, "weight_decay": WEIGHT_DECAY},
    }
    with tempfile.TemporaryDirectory() as folder:
        setup(
            model_name=config.name,
            model_config=config,
            out_dir=Path(folder),
            precision="bf16-mixed" if flags.bf16 else "32-true",
            data=Rows(rows(flags.tokens, flags.context + 1, count * flags.batch)),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=flags.batch,
                micro_batch_size=flags.batch,
                max_tokens=count * flags.batch * flags.context,
                max_norm=MAX_GRAD_NORM,
                min_lr=flags.learning_rate,
                lr_warmup_steps=0,
                tie_embeddings=True,
            ),
            eval=EvalArgs(interval=count + 1, final_validation=False),
            optimizer=optimizer,
            devices=1,
            logger_name="csv",
        )


if __name__ == "__main__":
    main()
