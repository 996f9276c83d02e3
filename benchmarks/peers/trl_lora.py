"""LoRA on conversations with TRL's SFTTrainer and PEFT; plain, with TRL's defaults."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from clock import Clock, last_loss
from datasets import Dataset, load_dataset
from peft import LoraConfig
from steps import BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, Steps
from trl import SFTConfig, SFTTrainer

Examples = Sequence[dict[str, Any]]

END = "<|im_end|>"
"""Pads, and ends a turn, in SmolLM2-Instruct; a folder made from GGUF does not say so."""


def conversations(path: Path, folder: Path) -> Dataset:
    """Rows with instruction, input and output as TRL's prompts and completions of messages."""
    copy = folder / "conversations.jsonl"
    with copy.open("w", encoding="utf-8") as file:
        for row in json.loads(path.read_text(encoding="utf-8")):
            question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
            prompt = [{"role": "user", "content": question}]
            answer = [{"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return load_dataset("json", data_files=str(copy), split="train", cache_dir=str(folder))


def counting(collate: Callable[[Examples], dict[str, Any]], counts: list[int]) -> Callable[[Examples], dict[str, Any]]:
    """The collator, which also notes how many tokens a batch has without its padding."""

    def collate_and_count(examples: Examples) -> dict[str, Any]:
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    return collate_and_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--timed", type=int, default=4)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no_checkpointing", action="store_true", help="TRL recomputes activations by default")
    flags = parser.parse_args()
    steps = Steps(flags.warm_up)
    chosen: dict[str, Any] = {} if flags.bf16 is None else {"bf16": flags.bf16}
    if flags.no_checkpointing:
        chosen["gradient_checkpointing"] = False
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            max_length=512,
            per_device_train_batch_size=8,
            max_steps=flags.warm_up + flags.timed,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=MAX_GRAD_NORM,
            packing=flags.packing,
            pad_token=END,
            eos_token=END,
            torch_compile=flags.compile,
            model_init_kwargs={"dtype": torch.float32},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **chosen,
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        data = conversations(flags.data, Path(folder))
        trainer = SFTTrainer(flags.model, arguments, train_dataset=data, peft_config=lora, callbacks=[Clock(steps)])
        counts: list[int] = []
        trainer.data_collator = counting(trainer.data_collator, counts)
        trainer.train()
        steps.loss = last_loss(trainer)
    steps.tokens = counts[: len(steps.ends)]
    steps.report()


if __name__ == "__main__":
    main()
