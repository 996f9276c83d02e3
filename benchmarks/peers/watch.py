"""Run a program that prints a line at each step, and time the lines.

    python watch.py --line 'loss (?P<loss>[0-9.]+)' --tokens 2048 --warm_up 2 --timed 4 -- COMMAND ...

The program is ended after the last step that is wanted, before it measures or saves anything.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

from steps import Steps


def watch(command: Sequence[str], line: str, tokens: int, steps: Steps, count: int) -> None:
    """Note each line that matches, until there are enough."""
    last: deque[str] = deque(maxlen=20)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        assert program.stdout is not None
        for text in program.stdout:
            last.append(text)
            if found := re.search(line, text):
                steps.done(tokens, float(found["loss"]))
            if len(steps.ends) == count:
                program.kill()
                return
    sys.exit(f"ended after {len(steps.ends)} steps of {count}:\n{''.join(last)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--line", required=True, help="regular expression of a step's line, with a group `loss`")
    parser.add_argument("--tokens", type=int, required=True, help="in a step")
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--timed", type=int, default=4)
    parser.add_argument("command", nargs="+")
    flags = parser.parse_args()
    steps = Steps(flags.warm_up)
    watch(flags.command, flags.line, flags.tokens, steps, flags.warm_up + flags.timed)
    steps.report()


if __name__ == "__main__":
    main()
