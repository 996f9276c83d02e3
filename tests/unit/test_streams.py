"""Output of long work that nobody reads any more."""

# ruff: noqa: T201

from __future__ import annotations

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from seedbed.streams import outlasting_readers


def test_what_is_printed_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    with outlasting_readers():
        print("out")
        print("err", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "err\n")


def test_a_pipe_without_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with outlasting_readers():
            print("read", flush=True)
            assert os.read(reader, 100) == b"read\n"
            os.close(reader)
            for _ in range(3):
                print("lost", flush=True)


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_is_no_file(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    if closed:
        stream.close()
    with outlasting_readers():
        print("said", flush=True)
    assert closed or stream.getvalue() == "said\n"


def test_no_stream_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with outlasting_readers():
        print("nowhere")


def test_characters_that_the_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with outlasting_readers():
        print("1 ☃", flush=True)
    assert written.getvalue() == b"1 ?\n"


def test_another_thread_leaves_the_streams_alone() -> None:
    def streams() -> tuple[object, object]:
        with outlasting_readers():
            return sys.stdout, sys.stderr

    before = sys.stdout, sys.stderr
    assert streams() != before
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(streams).result() == before
    assert (sys.stdout, sys.stderr) == before
