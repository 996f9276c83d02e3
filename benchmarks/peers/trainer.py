"""GPT-2 from scratch with the Trainer of transformers; plain, it is as its documentation begins."""

from __future__ import annotations

import tempfile

from clock import Clock, last_loss
from steps import BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, Steps, rows, timed_steps, training_parser
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def main() -> None:
    flags = training_parser(__doc__).parse_args()
    config = GPT2Config(
        vocab_size=flags.vocab_size,
        n_positions=flags.context,
        n_embd=flags.width,
        n_layer=flags.layers,
        n_head=flags.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The same function in one kernel; the default is written out in five.
        activation_function="gelu_pytorch_tanh" if flags.bf16 else "gelu_new",
    )
    steps = Steps(flags.warm_up)
    count = timed_steps(flags)
    data = [{"input_ids": row, "labels": row} for row in rows(flags.tokens, flags.context, count * flags.batch)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=count,
            per_device_train_batch_size=flags.batch,
            learning_rate=flags.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=MAX_GRAD_NORM,
            bf16=flags.bf16,
            torch_compile=flags.compile,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock(steps, flags.batch * flags.context)
        trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[clock])
        trainer.train()
    steps.loss = last_loss(trainer)
    steps.report()


if __name__ == "__main__":
    main()
