"""Guesses at the next tokens of a text: what came next when it said the same before (Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

LONGEST: Final = 3  # tokens that must be the same as before; failing that two, failing that one
TOKENS_OF_LUCK: Final = 8


class Lookup:
    """The tokens of a text, and where each few of them were last followed by another.

    lookup = Lookup([5, 6, 7, 5])
    lookup.guess(4)  # [6, 7, 5, 6]
    lookup.add(6)

    Attributes:
        tokens: all so far.
        luck: the share of the newest tokens, some 8 of them, that a guess would have met.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # by what stands where
        for token in tokens:
            self._append(token)
        self.luck = 0.5

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        self.luck += ((self.guess(1) == [token]) - self.luck) / TOKENS_OF_LUCK
        self._append(token)

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens; none if the newest token is new to the text."""
        for length in range(LONGEST, 0, -1):
            place = self._followed.get(tuple(self.tokens[-length:]))
            if place is not None:
                period = len(self.tokens) - place  # at the end of the text, what it would repeat is repeated
                return [self.tokens[place + ahead % period] for ahead in range(count)]
        return []

    def _append(self, token: int) -> None:
        place = len(self.tokens)
        for length in range(1, min(LONGEST, place) + 1):
            self._followed[tuple(self.tokens[place - length :])] = place
        self.tokens.append(token)
