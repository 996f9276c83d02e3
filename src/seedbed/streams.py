"""Standard output and error of long work, which goes on when nobody reads them any more."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def outlasting_readers() -> Iterator[None]:
    """Inside, what is printed goes nowhere once its reader is gone: a pipe's other end, a terminal, room on a disk.

    A run is not to end because `| tee log` got the same Ctrl-C, or because a connection was cut. The streams are those
    of the whole program, so a run in a thread leaves them as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.redirect_stdout(_lasting(sys.stdout)), contextlib.redirect_stderr(_lasting(sys.stderr)):
        yield


def _lasting(stream: TextIO) -> TextIO:
    return stream if stream is None else cast(TextIO, _Lasting(stream))  # a program may have none


class _Lasting:
    """A text stream whose writing never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._silenced_by_errors():
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._silenced_by_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced_by_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # a ValueError where the stream itself is closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)  # what is buffered must go somewhere when the program ends
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
