"""Reasons to stop early: signals and the clock."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

ECHO = 5.0
"""Seconds after the first signal in which SIGTERM and SIGHUP say nothing new: whoever ends a job sends it to all of its
processes, torchrun passes on what it was sent, and systemd sends both."""

_asked_at = -math.inf
"""When a run was last asked to stop."""

SAVING = "saving after this step; once more leaves at once without saving"


def _is_echo(number: int) -> bool:
    return number != signal.SIGINT and time.monotonic() - _asked_at < ECHO


@dataclass
class StopRequest:
    """Made by the first signal to any process; the loop finishes its step, saves and leaves."""

    received: int = 0
    """The signal that came to this process."""
    signal: signal.Signals | None = None
    """The one that all processes know of."""
    agree: Callable[[int], int] = int
    """Of the numbers that the processes give it together, the largest."""

    def heard(self) -> bool:
        """Whether there is a signal; all processes ask together, and are told the same."""
        if number := self.agree(self.received):
            self.signal = signal.Signals(number)
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        assert self.signal is not None
        return 128 + self.signal.value


@contextlib.contextmanager
def listen_for_signals(agree: Callable[[int], int] = int) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a `StopRequest`; a second one leaves at once."""
    request = StopRequest(agree=agree)

    def handle(number: int, _frame: FrameType | None) -> None:
        global _asked_at
        if request.received:
            if _is_echo(number):
                return
            raise KeyboardInterrupt
        request.received, _asked_at = number, time.monotonic()
        # Not print: the signal may have come in the middle of one, and a stream is not entered twice.
        with contextlib.suppress(OSError):  # nobody is there to read it
            os.write(2, f"\n{signal.Signals(number).name}: {SAVING}\n".encode())

    with _handled_by(handle, "SIGINT", "SIGTERM", "SIGHUP"):
        yield request


@contextlib.contextmanager
def leave_on_signals() -> Iterator[None]:
    """Before there is anything to save, SIGTERM and SIGHUP end the program as Ctrl-C does, by an exception.

    Raises:
        SystemExit: with 128 and the number of the signal.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        if _is_echo(number):  # it came during training, which was saved
            return
        raise SystemExit(128 + number)

    with _handled_by(leave, "SIGTERM", "SIGHUP"):
        yield


@contextlib.contextmanager
def _handled_by(handle: Handler, *names: str) -> Iterator[None]:
    """Some signals have this handler; SIGHUP not under nohup, which has the program ignore it."""
    previous = {}
    for name in names:
        # Outside the main thread (some notebooks) handlers cannot be set; Python's own then apply.
        with contextlib.suppress(ValueError, AttributeError):
            number = getattr(signal, name)
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


class Stopwatch:
    """Seconds of training, counting earlier sittings, against a budget in hours."""

    def __init__(self, used: float, hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock() - used
        self._budget = hours * 3600

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def share_used(self) -> float:
        """Share of the budget that is gone, 0 to 1."""
        return min(1.0, self.seconds / self._budget)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._budget - self.seconds)
