"""Greedy text from seedbed's Python interface: the whole call is timed, prompts included."""

from __future__ import annotations

import statistics
import sys
import time

from steps import generation_parser, passages, report_speed

import seedbed


def main() -> None:
    flags = generation_parser(__doc__).parse_args()
    model = seedbed.load(flags.model)
    prompts = passages(flags.text, flags.batch)
    seconds = []
    for _ in range(1 + flags.timed):
        began = time.perf_counter()
        texts = model.generate(prompts, max_new_tokens=flags.new_tokens, greedy=True, repetition_penalty=1.0)
        seconds.append(time.perf_counter() - began)
    written = [len(model.tokenizer.encode(text)) for text in texts]
    if min(written) < 0.9 * flags.new_tokens:
        sys.exit(f"a text ended early; tokens written: {written}")
    report_speed(flags.batch * flags.new_tokens / statistics.median(seconds[1:]))


if __name__ == "__main__":
    main()
