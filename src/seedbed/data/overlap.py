"""Does held-out text also stand in the training text? Then what is measured on it is partly learnt by heart.

Texts are compared by their windows of 13 consecutive words, as for GPT-3 (Brown et al., 2020, appendix C). Words are
those of `words_of`, without case and punctuation; text without spaces between its words is compared by the pieces
between its white space, so more roughly.

W: words in a window; N: numbers of the words of some documents; K: windows.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, repeat

import numpy as np
from numpy.typing import NDArray

from seedbed.data.conversations import words_of
from seedbed.errors import DataError

NAME = "held_out_overlap"
"""What `--allow` takes."""

WORDS = 13
LIMIT = 0.01
"""Share of held-out windows up to which an overlap is left in peace. Quotations and boilerplate recur in texts that
have nothing to do with each other, and were so little learnt wholly by heart, the loss would be lower by 1 %. Of a
tenth of Shakespeare's plays, or of WikiText's articles, none stands in the other nine."""

EXCERPT_WORDS = 20
EXCERPT_CHARS = 200  # for text whose words are very long
_BATCH = 2**16  # words gathered before arrays are made of them; documents may be small

_STOP = 0  # between documents, and for words that the held-out text has not: no window reaches across
_FILLER = ""  # no word is empty; lengthens a short document to one window, which only its equal has
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: neighbouring numbers land far apart


@dataclass(frozen=True)
class Overlap:
    """How much of a held-out text also stands in a training text."""

    share: float
    """Of the held-out windows, over all documents."""
    documents: int
    """Held-out documents of which at least half of the windows are in the training text."""
    excerpt: str
    """The first words of the held-out text that are in the training text, as they stand there; cut if they are many."""


def require_no_overlap(train: Iterable[str], held_out: Iterable[str], *, what: str, where: str) -> None:
    """Refuse held-out text of which more than `LIMIT` also stands in the training text.

    Args:
        train, held_out: documents, as of `find_overlap`.
        what: names the held-out text: "held-out text of domain shakespeare", or "the text of --val_data b.txt".
        where: names the training text: "--data a.txt".

    Raises:
        DataError: with the share, the number of documents and an excerpt.
    """
    overlap = find_overlap(train, held_out)
    if overlap is None or overlap.share <= LIMIT:
        return
    documents = f" and at least half of {overlap.documents:,} document(s)" if overlap.documents else ""
    raise DataError(
        f"{what} also stands in the training text {where} ({overlap.share:.1%} of it{documents}; at most {LIMIT:.0%} "
        f"may), as in {overlap.excerpt!r}; a loss measured on it would look better than it is. Take it out of one of "
        f"them, or pass --allow {NAME} to train on it all the same"
    )


def find_overlap(train: Iterable[str], held_out: Iterable[str], *, words: int = WORDS) -> Overlap | None:
    """How much of `held_out` also stands in `train`; None if nothing does.

    A held-out document shorter than `words` is one window, which only a training document of the same words has.
    Both are read once, the held-out text first; it and its windows stay in memory, the training text passes by.
    """
    assert words > 0, words
    number: defaultdict[str, int] = defaultdict(count(_STOP + 1).__next__)
    texts: list[str] = []
    sizes: list[int] = []  # windows of each document

    def read() -> Iterator[list[str]]:
        for text in held_out:
            if said := words_of(text):
                texts.append(text)
                sizes.append(max(1, len(said) - words + 1))
                yield said

    hashes = np.concatenate([*_hashes(read(), words, number.__getitem__), np.empty(0, np.uint64)])  # (K,)
    distinct, which = np.unique(hashes, return_inverse=True)  # (distinct,), (K,)
    seen = _seen(distinct, _hashes(map(words_of, train), words, lambda word: number.get(word, _STOP)))
    found = seen[which]  # (K,)
    if not found.any():
        return None
    starts = np.cumsum([0, *sizes])  # (documents + 1,)
    found_of = np.add.reduceat(found, starts[:-1], dtype=np.int64)  # (documents,)
    first = int(np.flatnonzero(found_of)[0])
    return Overlap(
        share=float(found.mean()),
        documents=int((2 * found_of >= sizes).sum()),
        excerpt=_excerpt(texts[first], found[starts[first] : starts[first + 1]], words),
    )


def _seen(distinct: NDArray[np.uint64], passing: Iterable[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """Which of the sorted hashes are among those passing by: (distinct,)."""
    seen = np.zeros(len(distinct), dtype=np.bool_)
    if not len(distinct):
        return seen
    for hashes in passing:
        places = np.searchsorted(distinct, hashes).clip(max=len(distinct) - 1)  # (K,)
        seen[places[distinct[places] == hashes]] = True
    return seen


def _hashes(
    documents: Iterable[list[str]], words: int, number_of: Callable[[str], int]
) -> Iterator[NDArray[np.uint64]]:
    """The hashes of all windows, in their order, for some documents at a time."""
    numbers = array("Q")
    for said in documents:
        if not said:
            continue
        numbers.extend(map(number_of, said))
        numbers.extend(repeat(number_of(_FILLER), words - len(said)))
        numbers.append(_STOP)
        if len(numbers) >= _BATCH:
            yield _window_hashes(np.array(numbers, dtype=np.uint64), words)
            del numbers[:]
    if numbers:
        yield _window_hashes(np.array(numbers, dtype=np.uint64), words)


def _window_hashes(numbers: NDArray[np.uint64], words: int) -> NDArray[np.uint64]:
    """The hashes of the windows without a stop: (N,) to (K,). There are more numbers than `words`.

    64 bits, so that two of a thousand million windows and a million others agree by chance once in 20,000 times.
    """
    windows = len(numbers) - words + 1
    hashes = np.zeros(windows, dtype=np.uint64)
    for place in range(words):
        hashes ^= numbers[place : place + windows]
        hashes *= _MULTIPLIER
        hashes ^= hashes >> np.uint64(32)
    stops = np.cumsum(np.concatenate(([0], numbers == _STOP)))  # (N + 1,), before each place
    return np.asarray(hashes[stops[words:] == stops[:-words]])  # (K,)


def _excerpt(text: str, found: NDArray[np.bool_], words: int) -> str:
    """The first run of words in windows that were found; `found` is (windows of this text,)."""
    first = int(found.argmax())
    run = int((~found[first:]).argmax()) or len(found) - first  # windows
    pieces = text.split()
    places = [place for place, piece in enumerate(pieces) if words_of(piece)]  # one for each word
    run_of = places[first : first + run + words - 1]
    shown = " ".join(pieces[run_of[0] : run_of[:EXCERPT_WORDS][-1] + 1])
    cut = len(run_of) > EXCERPT_WORDS or len(shown) > EXCERPT_CHARS
    return f"{shown[:EXCERPT_CHARS]} …" if cut else shown
