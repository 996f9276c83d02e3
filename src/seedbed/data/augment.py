"""Twice the training text: a copy of each document with some neighbouring words swapped.

Random swaps of words are one of the four operations of "easy data augmentation" (Wei and Zou, 2019), which helped
classifiers of a few hundred examples. A language model also learns the swapped order itself, so this can help where
there is little text, and hurts where the order of words is the lesson: poems, code, exercises in grammar. Only training
documents are meant for it, after the split, so that no copy of a held-out text is trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from seedbed.data.conversations import from_document, to_document
from seedbed.text.template import Message

SHARE = 0.1  # swaps a word, as Wei and Zou recommend

# What stands between white space, without the punctuation around it, is a word if it has a letter or a digit: so the
# dash of a list stays in its place, and a mark such as <unk> stays whole.
_PUNCTUATION = r"""\s.,;:!?…"'“”‘’()\[\]{}«»"""
_WORD = re.compile(rf"[^{_PUNCTUATION}](?:\S*[^{_PUNCTUATION}])?")
_LETTER = re.compile(r"[^\W_]")


def swap_words(text: str, key: int, swaps: float = SHARE) -> str:
    """`text` with `swaps` times its number of words swaps of neighbours, at least one, and no word moved twice.

    Words change places; white space, line ends and the punctuation around words stay. The result is a pure function of
    the arguments, the same under every version of NumPy, and differs from `text` whenever that has two different words.

    >>> swap_words("The cat sat.", key=0)
    'The sat cat.'
    """
    spans = [match.span() for match in _WORD.finditer(text) if _LETTER.search(match[0])]
    words = [text[start:end] for start, end in spans]
    left = _chosen([place for place in range(len(words) - 1) if words[place] != words[place + 1]], text, key)
    moved: set[int] = set()
    for place in left:
        if len(moved) >= 2 * max(1, round(swaps * len(words))):
            break
        if moved.isdisjoint((place, place + 1)):
            words[place], words[place + 1] = words[place + 1], words[place]
            moved.update((place, place + 1))
    pieces: list[str] = []
    done = 0
    for (start, end), word in zip(spans, words, strict=True):
        pieces += text[done:start], word
        done = end
    return "".join([*pieces, text[done:]])


def swap_conversation(messages: Sequence[Message], key: int) -> list[Message]:
    """The messages with the words of the user swapped; what the model is to say stays as it is."""
    return [_swap_message(message, key) if message["role"] == "user" else dict(message) for message in messages]


def augmented(documents: Iterable[str], seed: int, is_conversation: bool) -> Iterator[str]:
    """Each document, followed by its copy with swapped words; texts in which nothing can be swapped have none.

    A conversation is a document as `conversations.to_document` writes it.
    """
    for document in documents:
        yield document
        copy = _swap_document(document, seed) if is_conversation else swap_words(document, seed)
        if copy != document:
            yield copy


def _swap_document(document: str, seed: int) -> str:
    return to_document(swap_conversation(from_document(document), seed))


def _swap_message(message: Message, key: int) -> Message:
    """A question in Alpaca's format has its two parts beside their sum; a template shows the one or the other."""
    parts: Message = {name: swap_words(message[name], key) for name in ("instruction", "input") if name in message}
    content = "\n\n".join(parts.values()) if parts else swap_words(message["content"], key)
    return {**message, **parts, "content": content}


def _chosen(places: list[int], text: str, key: int) -> list[int]:
    """The places in random order, by Philox numbers as in `rows.permutation`, keyed by `key` and the text."""
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    philox = np.random.Philox(key=np.array([key % 2**64, digest], dtype=np.uint64))
    order = np.argsort(philox.random_raw(len(places)), kind="stable")
    return [places[index] for index in order]
