"""The script that most people write: batches of lines through the fast tokenizer, ids into a file."""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
from steps import report_speed
from tokenizers import Tokenizer

LINES_AT_ONCE = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fast", action="store_true", help="leave out offsets, which nobody reads")
    flags = parser.parse_args()
    began = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(flags.tokenizer))
    encode = tokenizer.encode_batch_fast if flags.fast else tokenizer.encode_batch
    with flags.text.open(encoding="utf-8") as text, flags.output.open("wb") as ids:
        while lines := list(islice(text, LINES_AT_ONCE)):
            for line in encode(lines):
                ids.write(np.asarray(line.ids, dtype=np.uint16).tobytes())
    report_speed(flags.text.stat().st_size / 1e6 / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
