"""Guesses at what comes next in a text."""

from __future__ import annotations

import pytest

from seedbed.lookup import Lookup


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 1], [2, 3, 1, 2]),  # round and round
        ([7, 1, 8, 2, 1], [8, 2, 1, 8]),
        ([1, 2, 5, 4, 2, 6, 9, 1, 2], [5, 4, 2, 6]),  # the longer place counts, not the later one
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2, 6]),  # of equally long ones the latest
        ([4, 4], [4, 4, 4, 4]),
    ],
)
def test_what_came_next_the_last_time(tokens: list[int], guess: list[int]) -> None:
    lookup = Lookup(())
    for token in tokens:
        lookup.add(token)
    assert lookup.tokens == tokens
    assert lookup.guess(4) == guess == Lookup(tokens).guess(4)
    assert lookup.guess(2) == guess[:2]
    assert lookup.guess(0) == lookup.guess(-1) == []


def test_luck_is_the_share_of_guesses_that_are_met() -> None:
    lookup = Lookup(range(100))
    for token in [*range(30)] * 2:
        lookup.add(token)
    assert lookup.luck > 0.9
    for token in range(200, 260):
        lookup.add(token)
    assert lookup.luck < 0.1
