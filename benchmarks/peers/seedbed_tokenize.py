"""seedbed's tokenized store made of a text, in a cache that is new."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from steps import report_speed

from seedbed.data import open_whole
from seedbed.data.store import Reading, open_store
from seedbed.text.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="its folder")
    parser.add_argument("--text", type=Path, required=True)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        open_store(open_whole(str(flags.text)), Reading(Tokenizer.load(flags.tokenizer)), cache=Path(cache))
        report_speed(flags.text.stat().st_size / 1e6 / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
