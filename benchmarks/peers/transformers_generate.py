"""Greedy text from transformers: the whole call of `generate` is timed, prompts included."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from steps import generation_parser, passages, report_speed
from transformers import AutoModelForCausalLM, AutoTokenizer

END = "<|im_end|>"
"""Pads, and ends a turn, in SmolLM2-Instruct; a folder made from GGUF does not say so."""


def main() -> None:
    parser = generation_parser(__doc__)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--static", action="store_true", help="a static cache")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--lookup", action="store_true", help="guesses from the text so far, of five tokens")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or END
    model: Any = AutoModelForCausalLM.from_pretrained(
        flags.model, dtype=torch.bfloat16 if flags.bf16 else torch.float32
    )
    model.generation_config.eos_token_id = None  # writes on to the last token
    if flags.compile:
        model.forward = torch.compile(model.forward)
    prompts = tokenizer(passages(flags.text, flags.batch), padding=True, return_tensors="pt")
    options: dict[str, Any] = {"cache_implementation": "static"} if flags.static else {}
    if flags.lookup:
        options["prompt_lookup_num_tokens"] = 5
    seconds = []
    for _ in range(1 + flags.timed):
        began = time.perf_counter()
        model.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=flags.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        seconds.append(time.perf_counter() - began)
    report_speed(flags.batch * flags.new_tokens / statistics.median(seconds[1:]))


if __name__ == "__main__":
    main()
