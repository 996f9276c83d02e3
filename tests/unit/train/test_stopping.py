"""Signals: which ask to stop, and which to stop at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest

from seedbed.train import stopping
from seedbed.train.stopping import leave_on_signals, listen_for_signals


@pytest.mark.parametrize("signals", [["SIGTERM", "SIGTERM"], ["SIGHUP", "SIGTERM"], ["SIGINT", "SIGTERM", "SIGHUP"]])
def test_what_is_sent_twice_at_once_is_one_request(signals: Sequence[str], capfd: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    with listen_for_signals() as request:
        for name in signals:
            os.kill(os.getpid(), signal.Signals[name])
        assert request.heard()
    assert request.signal is signal.Signals[signals[0]]
    assert capfd.readouterr().err.count("saving after this step") == 1


def test_an_echo_that_comes_after_the_save_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with leave_on_signals():
        with listen_for_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(stopping, "ECHO", 0)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("first", "second", "echo"), [("SIGINT", "SIGINT", 5), ("SIGTERM", "SIGINT", 5), ("SIGTERM", "SIGTERM", 0)]
)
def test_one_more_leaves_at_once(first: str, second: str, echo: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ECHO", echo)
    with listen_for_signals():
        os.kill(os.getpid(), signal.Signals[first])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.Signals[second])
