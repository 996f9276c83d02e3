"""What a processor can do, measured, and what a tree of processes holds in memory."""

from __future__ import annotations

import os
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SIDE = 2048
COPIED_BYTES = 2**28
REPEATS = 7


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor says it has."""
    flags = re.search(r"^flags\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return [name for name in INSTRUCTION_SETS if flags and name in flags[1].split()]


def median_seconds(work: Callable[[], object]) -> float:
    """The median time of several calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second in products of square matrices."""
    left, right = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / median_seconds(lambda: left @ right)


def copy_rate() -> float:
    """Bytes a second copied from one place in memory to another; each is read and written, and counted once."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return COPIED_BYTES / median_seconds(lambda: target.copy_(source))


def capabilities() -> dict[str, Any]:
    """The figures that a result is read against."""
    return {
        "instruction_sets": instruction_sets(),
        "load": os.getloadavg()[0],
        "float32_gflops": round(matrix_rate(torch.float32) / 1e9, 1),
        "bfloat16_gflops": round(matrix_rate(torch.bfloat16) / 1e9, 1),
        "copy_gb_per_second": round(copy_rate() / 1e9, 1),
    }


class PeakMemory:
    """The most that a process and all below it held, looked at five times a second while the block runs.

    Pages that belong to a process alone, or to shared memory, are added up; pages of files, which are mostly libraries
    that all processes of a tree map alike, are counted once: as many as the process has that maps most of them.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.bytes = max(self.bytes, resident(process_tree(self.pid)))


def process_tree(pid: int) -> list[int]:
    """A process and its descendants, as far as they still are."""
    found, new = [pid], [pid]
    while new:
        new = [child for parent in new for child in children(parent)]
        found += new
    return found


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in read_text(task).split()]
    return found


def resident(pids: list[int]) -> int:
    """Bytes of memory that processes hold together; see `PeakMemory`."""
    states = [memory_of(pid) for pid in pids]
    own = sum(state.get("RssAnon", 0) + state.get("RssShmem", 0) for state in states)
    return own + max(state.get("RssFile", 0) for state in states)


def memory_of(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; none of a process that is gone."""
    status = read_text(Path(f"/proc/{pid}/status"))
    return {name: 1024 * int(size) for name, size in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE)}


def read_text(path: Path) -> str:
    """A file's text; nothing where the process it tells of has just ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
