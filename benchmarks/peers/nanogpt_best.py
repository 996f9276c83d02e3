"""nanoGPT's model and optimizer groups with what its train.py leaves out on a CPU: bf16, compile, fused AdamW.

train.py takes a null context on a CPU, whatever its dtype says; so the loop here is ours and does what its loop does.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from steps import BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, Steps, rows, timed_steps, training_parser


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout")
    flags = parser.parse_args()
    sys.path.append(str(flags.nanogpt))
    nanogpt = importlib.import_module("model")
    config = nanogpt.GPTConfig(
        block_size=flags.context,
        vocab_size=flags.vocab_size,
        n_layer=flags.layers,
        n_head=flags.heads,
        n_embd=flags.width,
        dropout=0.0,
        bias=True,
    )
    model = nanogpt.GPT(config)
    # It takes the fused kernel when it is told "cuda"; torch has one for the CPU too.
    optimizer = model.configure_optimizers(WEIGHT_DECAY, flags.learning_rate, BETAS, "cuda")
    forward = torch.compile(model) if flags.compile else model
    steps, count = Steps(flags.warm_up), timed_steps(flags)
    # (steps, B, T + 1)
    batches = rows(flags.tokens, flags.context + 1, count * flags.batch).view(count, flags.batch, -1)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16) if flags.bf16 else nullcontext():
            _, loss = forward(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.done(flags.batch * flags.context, loss.item())
    steps.report()


if __name__ == "__main__":
    main()
