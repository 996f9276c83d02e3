"""The runs that are going, each in processes of its own, and the devices that they share."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

KEEPER = Path(__file__).with_name("keeper.py")

Slot = Mapping[str, str]
"""Environment variables that give one run its part of the machine."""


@dataclass(frozen=True)
class Child:
    """A run that is going."""

    name: str
    process: subprocess.Popen[bytes]
    slot: Slot


class Children:
    """At most one run a slot."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._free = list(slots)
        self._told = False
        self.going: dict[str, Child] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of runs that are still going: their keepers tell them to save and leave."""
        for child in self.going.values():
            let_go(child)

    @property
    def full(self) -> bool:
        return not self._free

    def start(self, name: str, words: Sequence[str], log: Path) -> None:
        """Run `seedbed WORDS` with its output added to `log`."""
        slot = self._free.pop(0)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            stream.write(f"$ seedbed {shlex.join(words)}\n".encode())
            stream.flush()
            process = subprocess.Popen(
                [sys.executable, "-I", str(KEEPER), sys.executable, "-m", "seedbed", *words],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **slot},
                start_new_session=True,
            )
        self.going[name] = Child(name, process, slot)

    def ended(self) -> Iterator[tuple[str, int]]:
        """Names and exit codes of runs that ended since the last call."""
        for child in list(self.going.values()):
            code = child.process.poll()
            if code is not None:
                let_go(child)
                del self.going[child.name]
                self._free.append(child.slot)
                yield child.name, code if code >= 0 else 128 - code

    def pass_on(self, number: signal.Signals) -> None:
        """Send a signal to every run, once: a second one makes it leave without saving.

        A run and its keeper are a process group of their own, which a terminal's Ctrl-C does not reach.
        """
        if not self._told:
            for child in self.going.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, number)
        self._told = True


def let_go(child: Child) -> None:
    """Close the pipe that tells a keeper that the sweep is there."""
    assert child.process.stdin is not None
    child.process.stdin.close()


def make_slots(at_once: int | None, devices: set[str]) -> list[Slot]:
    """Parts of this machine for runs whose `--device` is one of `devices`: GPUs one each, else a CPU's cores divided.

    Without a number there are as many as GPUs, and one on a CPU.
    """
    gpus = visible_gpus() if devices <= {"auto", "cuda"} else []
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(at_once or len(gpus))]
    if at_once in (None, 1):
        return [{}]
    return [{"OMP_NUM_THREADS": str(max(1, usable_threads() // at_once))}] * at_once


def usable_threads() -> int:
    """What OMP_NUM_THREADS allows, of a list such as `4,2` for nested threads the first; else all cores."""
    allowed = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(allowed) if allowed.isdecimal() else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Names of the GPUs that runs may use, as CUDA_VISIBLE_DEVICES takes them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
