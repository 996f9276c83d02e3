"""Several processes that train together, forked from this one, so that they begin with everything imported."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.faults.injection import start

Work = Callable[[int], int]


def start_together(size: int, work: Work, logs: Path) -> list[int]:
    """Process ids of `size` processes, as torchrun would start them; number n does `work(n)` and writes `logs/n`."""
    importlib.import_module("torch._dynamo")  # by every optimizer, a second each time in a child
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [start(lambda rank=rank: _one(rank, size, port, work, logs)) for rank in range(size)]  # type: ignore[misc]


def wait_for(pids: list[int]) -> list[int]:
    """Their exit codes; minus the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _one(rank: int, size: int, port: int, work: Work, logs: Path) -> int:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    log = (logs / str(rank)).open("w", buffering=1, encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    try:
        return work(rank)
    except BaseException:
        traceback.print_exc()
        raise


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
