from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from seedbed.data.augment import augmented, swap_conversation, swap_words
from seedbed.data.conversations import from_document, to_document
from seedbed.data.python_docs import python_docs

TEXT = 'He said: "Wait,\tplease!"\n\n  - and (then) he left;\n  - don\'t follow <unk> him.\n'


def layout(text: str) -> str:
    """White space and punctuation, with every word as one letter."""
    return re.sub(r"<?\w+(?:'\w)?>?", "w", text)


def test_words_move_and_the_layout_stays() -> None:
    for key in range(20):
        swapped = swap_words(TEXT, key)
        assert swapped != TEXT
        assert layout(swapped) == layout(TEXT)
        assert Counter(re.findall(r"[\w'<>]+", swapped)) == Counter(re.findall(r"[\w'<>]+", TEXT))


def test_the_swaps_are_fixed_for_all_time() -> None:
    """An augmented run is resumed under another NumPy: these texts must never change."""
    assert swap_words("The cat sat.", 0) == "The sat cat."
    assert (
        swap_words("one two three four five six seven eight", 7, swaps=0.3) == "two one three four five six eight seven"
    )


def test_swaps_depend_on_the_key_and_on_the_text() -> None:
    text = " ".join(f"w{i}" for i in range(100))
    assert swap_words(text, 1) == swap_words(text, 1)
    assert swap_words(text, 1) == swap_words(text, 1 + 2**64)
    assert swap_words(text, 1) != swap_words(text, 2)
    places = [
        [i for i, word in enumerate(swap_words(t, 1).split()) if word != t.split()[i]] for t in (text, f"x{text}")
    ]
    assert places[0] != places[1]


@pytest.mark.parametrize(("swaps", "moved"), [(0.0, 2), (0.1, 20), (0.25, 50)])
def test_as_many_swaps_of_neighbours_as_asked_for(swaps: float, moved: int) -> None:
    words = [f"w{i}" for i in range(100)]
    swapped = swap_words(" ".join(words), 3, swaps).split()
    places = [i for i in range(100) if swapped[i] != words[i]]
    assert len(places) == moved
    for left, right in zip(places[::2], places[1::2], strict=True):
        assert right == left + 1
        assert (swapped[left], swapped[right]) == (words[right], words[left])


@pytest.mark.parametrize("text", ["", " \n", "word", "  word.\n", "no no no", "... --- !!!", "- word", "= = ="])
def test_texts_without_two_different_words_stay(text: str) -> None:
    assert swap_words(text, 0) == text


def test_two_different_words_always_change() -> None:
    for key in range(50):
        assert swap_words("no no no yes no no no", key) != "no no no yes no no no"
        assert swap_words("a b", key) == "b a"


def test_only_the_words_of_the_user_are_swapped() -> None:
    messages = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am a model."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome."},
    ]
    before = [dict(message) for message in messages]
    swapped = swap_conversation(messages, 5)
    assert messages == before
    assert [message["role"] for message in swapped] == [message["role"] for message in messages]
    changed = [place for place in range(5) if swapped[place] != messages[place]]
    assert changed == [1]
    assert sorted(swapped[1]["content"].rstrip("?").split()) == ["Who", "are", "you"]


def test_each_text_is_followed_by_its_copy() -> None:
    texts = ["One two three.", "word", "Four five."]
    copies = list(augmented(texts, 0, is_conversation=False))
    assert copies == ["One two three.", swap_words(texts[0], 0), "word", "Four five.", "five Four."]


def test_a_conversation_stays_one() -> None:
    talk = [{"role": "user", "content": "Say it now."}, {"role": "assistant", "content": "It is said."}]
    short = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."}]
    documents = [to_document(talk), to_document(short)]
    original, copy, unswapped = augmented(documents, 0, is_conversation=True)
    assert [original, unswapped] == documents
    assert from_document(copy) == swap_conversation(talk, 0)
    assert from_document(copy)[1] == talk[1]
    assert copy != original


def test_the_parts_of_an_alpaca_question_are_swapped_with_their_sum() -> None:
    question = {"role": "user", "content": "Sort these.\n\nb a", "instruction": "Sort these.", "input": "b a"}
    [swapped, answer] = swap_conversation([question, {"role": "assistant", "content": "a b"}], 0)
    assert swapped == {
        "role": "user",
        "content": "these Sort.\n\na b",
        "instruction": "these Sort.",
        "input": "a b",
    }
    assert answer["content"] == "a b"


def test_real_text_is_doubled_as_it_streams_by() -> None:
    texts = list(islice(python_docs(), 5))
    pairs = list(augmented(iter(texts), 1, is_conversation=False))
    assert pairs[::2] == texts
    for text, copy in zip(texts, pairs[1::2], strict=True):
        assert copy != text
        assert len(copy) == len(text)
        assert copy.count("\n") == text.count("\n")
        assert Counter(copy) == Counter(text)
