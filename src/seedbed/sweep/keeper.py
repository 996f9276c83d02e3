"""A process between a sweep and one of its runs, so that no run goes on alone when the sweep was killed.

    python keeper.py COMMAND ...

It starts COMMAND and ends with its exit code. Its standard input is a pipe that the sweep holds: when the sweep is
gone, in whatever way, the pipe closes, and the run is told to save and leave. Signals are the run's to answer: they
are sent to both. Uses nothing of seedbed, so that it starts in an instant.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def leave_when_alone(run: subprocess.Popen[bytes]) -> None:
    """Wait until the pipe closes, then ask the run to save and leave."""
    while os.read(0, 1):
        pass
    run.terminate()


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    run = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=leave_when_alone, args=[run], daemon=True).start()
    code = run.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
