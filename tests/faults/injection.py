"""Faults that really happen: a process that dies at its k-th call to the file system, and a disk that forgets.

A child is forked, so that it begins with everything imported. Each fault tells whether it fired.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any, Final

DIED: Final = 137
FAILED: Final = 99
CALLS: Final = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.copyfile")
"""What Python tells of the file system before it happens; fsync is added."""


def many(faults: int) -> int:
    """So many with `make faults`, a sixth of them in the suite."""
    return faults * int(os.environ["SEEDBED_FAULTS"]) if "SEEDBED_FAULTS" in os.environ else -(-faults // 6)


def forked(work: Callable[[], int]) -> int:
    """Exit code of `work`, run in a child of this process; minus the signal that ended it."""
    pid = start(work)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def start(work: Callable[[], int]) -> int:
    """Process id of a child that ends with what `work` returns; it says nothing."""
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        code = work()
    except SystemExit as left:  # what a signal raises before there is anything to save
        code = left.code if isinstance(left.code, int) else FAILED
    finally:
        os._exit(code)


class FileSystem:
    """Counts the calls that touch files below a folder; the process dies before number `dies_at`, from 0.

    With `forgets`, the files that were not flushed to the disk lose part of what was written, as in a power cut.
    """

    def __init__(self, folder: Path, dies_at: int = -1, forgets: random.Random | None = None) -> None:
        self.calls = 0
        self._folder, self._dies_at, self._forgets = str(folder), dies_at, forgets
        self._flushed: set[int] = set()
        self._one_at_a_time = RLock()
        self._before = {path.stat().st_ino for path in folder.rglob("*")}
        self._fsync = os.fsync
        os.fsync = self._watched_fsync  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _watched_fsync(self, descriptor: int) -> None:
        self._count(f"/proc/self/fd/{descriptor}")
        self._fsync(descriptor)
        self._flushed.add(os.fstat(descriptor).st_ino)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and not (event == "open" and self._reads(arguments)):
            self._count(arguments[0])

    @staticmethod
    def _reads(arguments: tuple[Any, ...]) -> bool:
        _, _, flags = arguments
        return not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

    def _count(self, path: object) -> None:
        name = str(path)
        # A name without a folder is that of an entry in one that is open, which is the run's.
        if name.startswith("/") and not name.startswith((self._folder, "/proc/self/fd/")):
            return
        with self._one_at_a_time:
            if self.calls == self._dies_at:
                self._dies_at = -1  # what follows is the disk's, not the program's
                if self._forgets:
                    self._forget(self._forgets)
                os._exit(DIED)
            self.calls += 1

    def _forget(self, choose: random.Random) -> None:
        for path in sorted(Path(self._folder).rglob("*")):
            if path.is_file() and path.stat().st_ino not in self._flushed | self._before and choose.random() < 0.7:
                size = path.stat().st_size
                os.truncate(path, choose.choice([0, size // 2, max(0, size - 1)]))
