from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from seedbed.data.conversations import words_of
from seedbed.data.documents import split_documents
from seedbed.data.overlap import (
    EXCERPT_CHARS,
    LIMIT,
    NAME,
    Overlap,
    _window_hashes,
    find_overlap,
    require_no_overlap,
)
from seedbed.errors import DataError

SPEECH = """Before we proceed any further, hear me speak. You are all resolved rather to die than to famish?
First, you know Caius Marcius is chief enemy to the people. Let us kill him, and we'll have corn at our own price."""

PASSAGE = """Robert Boulter is an English film, television and theatre actor. He had a guest-starring role on the
television series The Bill in 2000. This was followed by a starring role in the play Herons by Simon Stephens."""

COUNTED = "one two three four five six seven eight nine ten eleven twelve thirteen"


def windows(text: str, words: int) -> list[tuple[str, ...]]:
    """What `find_overlap` looks at; a short document is marked, so that only its equal equals it."""
    said = words_of(text)
    if len(said) < words:
        return [("whole", *said)] if said else []
    return [tuple(said[start : start + words]) for start in range(len(said) - words + 1)]


def by_hand(train: list[str], held_out: list[str], words: int) -> tuple[float, int]:
    known = {window for text in train for window in windows(text, words)}
    found = [[window in known for window in windows(text, words)] for text in held_out]
    total = sum(map(len, found))
    return sum(map(sum, found)) / max(total, 1), sum(bool(one) and 2 * sum(one) >= len(one) for one in found)


def measured(overlap: Overlap | None) -> tuple[float, int]:
    return (overlap.share, overlap.documents) if overlap else (0.0, 0)


def documents(name: str) -> list[str]:
    folder = os.environ.get("SEEDBED_TEST_DATA")
    if not folder:
        pytest.skip(f"needs {name} in the folder $SEEDBED_TEST_DATA")
    text = (Path(folder) / name).read_text(encoding="utf-8")
    return list(split_documents([text], "auto", len(text.encode())))


def test_the_same_text_is_all_there() -> None:
    overlap = find_overlap([SPEECH, PASSAGE], [PASSAGE, SPEECH])
    assert overlap == Overlap(1.0, 2, " ".join(PASSAGE.split()[:20]) + " …")


def test_other_text_and_no_text_are_left_in_peace() -> None:
    assert find_overlap([SPEECH], [PASSAGE]) is None
    assert find_overlap([], [PASSAGE]) is None
    assert find_overlap([SPEECH], []) is None
    assert find_overlap([SPEECH, "", " \n", "..."], ["", " \n", "... !", '"']) is None


def test_a_part_is_counted_by_its_windows() -> None:
    quoting = f"He said: {' '.join(SPEECH.split()[5:22])} And he left."
    overlap = find_overlap([quoting], [PASSAGE, SPEECH])
    assert overlap
    total = len(windows(PASSAGE, 13)) + len(windows(SPEECH, 13))
    assert overlap.share == pytest.approx((17 - 13 + 1) / total)
    assert overlap.documents == 0
    assert overlap.excerpt == " ".join(SPEECH.split()[5:22])


def test_windows_that_recur_count_each_time() -> None:
    overlap = find_overlap([SPEECH], [SPEECH, SPEECH, PASSAGE])
    assert measured(overlap) == by_hand([SPEECH], [SPEECH, SPEECH, PASSAGE], 13)
    assert overlap
    assert overlap.documents == 2


def test_half_of_a_document_is_enough_to_count_it() -> None:
    held_out = " ".join(f"w{place}" for place in range(16))  # four windows
    for words, counted in ((13, 0), (14, 1), (15, 1)):
        overlap = find_overlap([" ".join(held_out.split()[:words])], [held_out])
        assert measured(overlap) == ((words - 12) / 4, counted)


def test_case_punctuation_and_line_breaks_do_not_hide_it() -> None:
    loud = SPEECH.upper().replace(" ", "\n\n").replace("FURTHER,", "“further” -").replace("-", "...")
    overlap = find_overlap([loud], [SPEECH])
    assert overlap
    assert overlap.share == 1
    assert overlap.excerpt.startswith("Before we proceed any further, hear me speak. You")


def test_short_documents_are_compared_whole() -> None:
    short = "To be, or not to be."
    assert find_overlap([short + " That is the question."], [short]) is None
    assert find_overlap([short], ["To be, or not."]) is None
    assert find_overlap(["To be, or", "not to be."], [short]) is None
    assert find_overlap([SPEECH, "to be or not to be"], [PASSAGE, short]) == Overlap(
        1 / (len(windows(PASSAGE, 13)) + 1), 1, short
    )
    assert measured(find_overlap([f"zero {COUNTED} fourteen"], [COUNTED])) == (1, 1)
    assert find_overlap([COUNTED.removesuffix(" thirteen")], [COUNTED]) is None


def test_no_window_reaches_from_one_document_into_the_next() -> None:
    halves = SPEECH.split("\n")
    assert find_overlap([" ".join(SPEECH.split()[:8]), " ".join(SPEECH.split()[8:16])], [SPEECH]) is None
    assert measured(find_overlap([SPEECH], halves)) == by_hand([SPEECH], halves, 13) == (1, 2)


def test_the_order_of_documents_and_the_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    vocabulary = [f"w{place}" for place in range(20)]
    train = [" ".join(rng.choices(vocabulary, k=rng.randrange(30))) for _ in range(60)]
    held_out = [" ".join(rng.choices(vocabulary, k=rng.randrange(30))) for _ in range(30)]
    whole = find_overlap(train, held_out, words=3)
    assert whole
    monkeypatch.setattr("seedbed.data.overlap._BATCH", 16)
    assert find_overlap(reversed(train), held_out, words=3) == whole
    assert measured(find_overlap(train, held_out[::-1], words=3)) == measured(whole)


def test_each_side_is_read_once_and_the_held_out_text_first() -> None:
    read: list[str] = []

    def passing(name: str, text: str) -> Iterator[str]:
        read.append(name)
        yield text

    assert find_overlap(passing("train", SPEECH), passing("held out", SPEECH))
    assert read == ["held out", "train"]


def test_random_texts_as_by_hand() -> None:
    rng = random.Random(1)
    partial = 0
    for _ in range(300):
        vocabulary = [f"w{place}" for place in range(rng.randint(1, 6))]
        train, held_out = (
            [" ".join(rng.choices(vocabulary, k=rng.randrange(12))) for _ in range(rng.randrange(8))] for _ in range(2)
        )
        words = rng.randint(1, 6)
        expected = by_hand(train, held_out, words)
        assert measured(find_overlap(train, held_out, words=words)) == pytest.approx(expected), (train, held_out, words)
        partial += 0 < expected[0] < 1
    assert partial > 50


def test_the_excerpt_is_cut() -> None:
    assert find_overlap([SPEECH], [SPEECH[7:]]) == Overlap(1, 1, " ".join(SPEECH[7:].split()[:20]) + " …")
    overlap = find_overlap(["字" * 5000], ["字" * 5000])
    assert overlap
    assert overlap.excerpt == "字" * EXCERPT_CHARS + " …"


def test_the_excerpt_keeps_signs_that_stand_alone() -> None:
    spaced = COUNTED.replace(" ", " , ")
    overlap = find_overlap([COUNTED], [f"; {spaced} ;"])
    assert overlap
    assert overlap.excerpt == spaced


# The check


def test_too_much_of_it_is_refused() -> None:
    with pytest.raises(DataError) as error:
        require_no_overlap(
            [SPEECH], [SPEECH, PASSAGE], what="held-out text of domain shakespeare", where="--data book.txt"
        )
    share = by_hand([SPEECH], [SPEECH, PASSAGE], 13)[0]
    excerpt = " ".join(SPEECH.split()[:20]) + " …"
    assert str(error.value) == (
        "held-out text of domain shakespeare also stands in the training text --data book.txt "
        f"({share:.1%} of it and at least half of 1 document(s); at most 1% may), as in {excerpt!r}; "
        "a loss measured on it would look better than it is. Take it out of one of them, or pass "
        "--allow held_out_overlap to train on it all the same"
    )
    assert NAME in str(error.value)


@pytest.mark.parametrize(("more", "refused"), [(0, False), (1, True)])
def test_up_to_the_limit_it_is_left_in_peace(more: int, refused: bool) -> None:
    held_out = " ".join(f"w{place}" for place in range(200 + 13 - 1))  # 200 windows, of which two are the limit
    train = " ".join(held_out.split()[: 2 + more + 13 - 1])
    assert LIMIT * 200 == 2
    if not refused:
        require_no_overlap([train], [held_out], what="the text of --val_data b.txt", where="--data a.txt")
        return
    with pytest.raises(DataError, match=r"the text of --val_data b.txt also .* --data a.txt \(1\.5% of it; at most 1%"):
        require_no_overlap([train], [held_out], what="the text of --val_data b.txt", where="--data a.txt")


def test_no_overlap_is_no_error() -> None:
    require_no_overlap([SPEECH], [PASSAGE], what="held-out text", where="--data a.txt")


# Without false alarms, and fast


def test_different_windows_have_different_hashes() -> None:
    """All pairs and triples of some words, in any order: of all windows, these differ least."""
    for kinds, words in ((700, 2), (70, 3)):
        places = np.indices((kinds,) * words).reshape(words, -1).T + 1  # (kinds ** words, words)
        numbers = np.pad(places, ((0, 0), (0, 1))).ravel().astype(np.uint64)  # a stop after each
        hashes = _window_hashes(numbers, words)
        assert len(hashes) == len(np.unique(hashes)) == kinds**words


def test_real_texts() -> None:
    plays, articles = documents("tinyshakespeare.txt"), documents("wikitext-2-valid.txt")
    assert find_overlap(plays, articles) is None
    for texts in (plays, articles):
        mixed = [*texts[::2], *(text[: len(text) // 3] for text in texts[1::2])]
        assert measured(find_overlap(mixed, texts)) == pytest.approx(by_hand(mixed, texts, 13))
        tenth, others = texts[::10], [text for place, text in enumerate(texts) if place % 10]
        assert find_overlap(others, tenth) is None
        assert measured(find_overlap(others, tenth, words=4)) == pytest.approx(by_hand(others, tenth, 4))


def test_megabytes_take_seconds_at_most() -> None:
    plays, articles = documents("tinyshakespeare.txt"), documents("wikitext-2-valid.txt")
    start = time.perf_counter()
    assert find_overlap(chain.from_iterable([plays] * 10), articles) is None
    assert time.perf_counter() - start < 5  # 11 MB; usually 0.7
