"""What needs no judge."""

from __future__ import annotations

import sys

import pytest

from seedbed.errors import MissingExtra
from seedbed.judge.references import chrf, exact_match


def test_exact_match_looks_at_words() -> None:
    assert exact_match("He goes to the park.", "he goes  to the PARK")
    assert exact_match('"Joyful."', "joyful")
    assert not exact_match("He goes", "He goes there")
    assert not exact_match("", "He goes")


def test_chrf() -> None:
    assert chrf("The cat sat", "The cat sat") == pytest.approx(100)
    assert chrf("", "The cat sat") == 0
    assert 20 < chrf("The cat slept", "The cat sat") < 90
    assert chrf("zzz", "abc") == 0


def test_without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingExtra, match=r"seedbed\[judge\]"):
        chrf("a", "b")
