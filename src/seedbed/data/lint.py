"""A look at the training data for what spoils a model: in one pass, in time that grows with the text alone.

A row is one conversation (or document), counted from 1 in the order given unless its number is given too. Its prompt
is all that comes before the last answer. Prompts are compared by their words: case, white space and the punctuation
around words do not count.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import pairwise
from statistics import median_low
from typing import Any, TypeVar

from seedbed.data.conversations import asked_words, words_of
from seedbed.findings import Finding, Level

T = TypeVar("T")
Conversation = Sequence[Mapping[str, Any]]
"""Messages, each with `role` and `content`, as `conversations.from_document` gives."""

EXAMPLES = 3  # shown with a finding
SHOWN_CHARS = 80  # of an example
LONG = 10  # times the median length, from which a row is long
ALWAYS_SHORT = 2000  # characters; a row of these is not long, whatever the median
ALIKE = 0.85  # share of a prompt's shingles that another has too, from which they are nearly the same
ENOUGH_SHINGLES = 12  # shared, before two prompts are nearly the same
COMMON = 3  # prompts; a shingle that more of them have is a turn of phrase
ENOUGH_ROWS = 100  # before anything is said of variety
VARIETY_ROWS = 10_000  # looked at for it: a share of distinct openings only compares at one size
VARIETY_WORDS = 100_000
FEW_OPENINGS = 0.02  # distinct openings a row; of 1,100 plain instructions it is 0.28
FEW_WORDS = 0.02  # distinct words a word; in the first 100,000 words of English prose it is about 0.1

_HEADING = r"#{2,}[ \t]*(?:instruction|input|response|output|question|answer|user|assistant|human|system)\b"
_NAME = r"(?:question|answer|user|assistant|human|system|bot|q|a)[ \t]*:|(?:user|assistant|system)[ \t]*\n"
_ROLE_LABEL = re.compile(
    rf"^(?i:{_HEADING})|\A\s*(?i:{_NAME})|^(?:QUESTION|ANSWER|USER|ASSISTANT|HUMAN|Assistant|Human)[ \t]*:",
    re.MULTILINE,
)
_SPECIAL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_ ]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\A\s*<s>|</s>\s*\Z"
)
_HTML_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,6}|#x[0-9A-Fa-f]{1,6});")


@dataclass(frozen=True)
class _Kind:
    what: str
    warn_from: float
    """Share of the rows from which it is a warning, and below a note; above 1 it never is."""
    remedy: str


_KINDS = {
    "empty_answers": _Kind("no answer, or an empty one", 0, "Drop these rows: they teach the model to say nothing."),
    "duplicates": _Kind("the same text as an earlier row", 0.01, "Keep one of each: copies are learned by heart."),
    "conflicting_answers": _Kind(
        "another answer to the prompt of an earlier row",
        2,
        "Nothing to do where several answers are right; else keep the better one.",
    ),
    "role_labels": _Kind(
        "a label of a role inside the text",
        0.01,
        "Take the labels out and give question and answer in columns of their own: the template adds its labels, and "
        "the model would learn to write both.",
    ),
    "special_tokens": _Kind(
        "a template's special token inside the text",
        0,
        "Take it out, or split the row into messages: it would begin or end a turn in the middle of one.",
    ),
    "html_entities": _Kind(
        "an HTML entity such as &amp;", 2, "If the text is not about HTML, run it through html.unescape."
    ),
    "echoed_prompts": _Kind(
        "an answer that begins with its own prompt",
        0.01,
        "Cut the prompt off these answers, or the model will repeat what it is asked.",
    ),
    "leaked": _Kind(
        "a validation row that repeats a training row (in a conversation, its prompt)",
        0.01,
        "Drop these from one side: the validation loss looks better than it is.",
    ),
    "nearly_leaked": _Kind(
        "a validation row whose prompt is nearly that of a training row",
        0.05,
        "Look at them, and drop from one side those that ask for the same: they make the validation loss look better.",
    ),
}

NAMES = (*_KINDS, "long_rows", "repeated_openings", "repeated_answer", "few_words")
"""Every finding that `lint` and `lint_texts` can make."""


def lint(
    train: Iterable[Conversation],
    validation: Iterable[Conversation] = (),
    *,
    rows: Iterable[int] | None = None,
    validation_rows: Iterable[int] | None = None,
    max_chars: int | None = None,
) -> list[Finding]:
    """What is odd about conversations to train on, and which of `validation` they give away.

    Args:
        train, validation: the conversations.
        rows, validation_rows: their numbers in the file, where that is not their order here.
        max_chars: a row is long from so many characters on; by default from 10 times the median.
    """
    held_out = _HeldOut((asked_words(messages) for messages in validation), validation_rows)
    sightings, variety = _Sightings(), _Variety()
    copies = _Copies(sightings)
    numbers, lengths = array("q"), array("q")
    for row, messages in _numbered(train, rows):
        prompt, answer = _last_exchange(messages)
        words = asked_words(messages)
        numbers.append(row)
        lengths.append(sum(len(message["content"]) for message in messages))
        for name, text in _row_problems(messages):
            sightings.add(name, row, text)
        copies.see(row, prompt, answer)
        held_out.see(row, words)
        variety.see(words, answer)
    total = len(lengths)
    return [
        *sightings.findings(total),
        *held_out.findings(),
        *_long_rows(numbers, lengths, max_chars),
        *variety.findings(),
    ]


def lint_texts(
    train: Iterable[str],
    validation: Iterable[str] = (),
    *,
    rows: Iterable[int] | None = None,
    validation_rows: Iterable[int] | None = None,
) -> list[Finding]:
    """What is odd about plain documents: copies, leaks into `validation`, leftovers of markup, few words.

    Arguments as of `lint`.
    """
    held_out = _HeldOut((words_of(text) for text in validation), validation_rows, near=False)
    sightings, variety = _Sightings(), _Variety()
    copies = _Copies(sightings)
    total = 0
    for row, text in _numbered(train, rows):
        total += 1
        words = words_of(text)
        for name, shown in _markup(text):
            sightings.add(name, row, shown)
        copies.see(row, text, "")
        held_out.see(row, words)
        variety.count_words(words)
    return [*sightings.findings(total), *held_out.findings(), *variety.few_words()]


def _numbered(things: Iterable[T], rows: Iterable[int] | None) -> Iterator[tuple[int, T]]:
    return enumerate(things, start=1) if rows is None else zip(rows, things, strict=True)


def _last_exchange(messages: Conversation) -> tuple[str, str]:
    """All before the last answer as one text, the last message first; and that answer (or nothing)."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    last = answers[-1] if answers else len(messages)
    prompt = "\n".join(message["content"] for message in reversed(messages[:last]))
    return prompt, messages[last]["content"] if answers else ""


def _row_problems(messages: Conversation) -> Iterator[tuple[str, str]]:
    """Names of what is wrong with the form of one conversation, and the text that shows it; each name once."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        asked = [message["content"] for message in messages if message["role"] == "user"]
        yield "empty_answers", asked[-1] if asked else ""
    for message in messages:
        if label := _ROLE_LABEL.search(message["content"]):
            yield "role_labels", message["content"][label.start() :]
            break
    for message in messages:
        if problems := list(_markup(message["content"])):
            yield from problems
            break
    for before, message in pairwise(messages):
        if message["role"] == "assistant" and _echoes(before["content"], message["content"]):
            yield "echoed_prompts", message["content"]
            break


def _markup(text: str) -> Iterator[tuple[str, str]]:
    if ("<" in text or "[" in text) and (token := _SPECIAL_TOKEN.search(text)):
        yield "special_tokens", text[token.start() :]
    if "&" in text and (entity := _HTML_ENTITY.search(text)):
        yield "html_entities", text[entity.start() :]


def _echoes(prompt: str, answer: str) -> bool:
    """Whether an answer begins with all of a prompt of at least four words, and goes on."""
    if prompt[:1].casefold() != answer[:1].casefold() or len(answer) <= len(prompt):
        return False
    asked = words_of(prompt)
    return len(asked) >= 4 and words_of(answer)[: len(asked)] == asked


class _Sightings:
    """How often each kind of problem was seen, and the first few places."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    def add(self, name: str, row: int, text: str, **more: int) -> None:
        self._counts[name] += 1
        if len(self._examples[name]) < EXAMPLES:
            self._examples[name].append({"row": row, **more, "text": _shorten(text)})

    def findings(self, rows: int) -> Iterator[Finding]:
        """One finding a kind, against the number of `rows` looked at."""
        for name, kind in _KINDS.items():
            count = self._counts[name]
            if not count:
                continue
            first = self._examples[name][0]
            yield Finding(
                name,
                "warning" if count >= kind.warn_from * rows else "note",
                f"{kind.what}: {count:,} of {rows:,} rows ({count / rows:.1%}), first row {first['row']}: "
                f"{first['text']!r}",
                {"count": count, "rows": rows, "examples": self._examples[name]},
                kind.remedy,
            )


class _Copies:
    """Which prompts, and which of their answers, were there before; as 64-bit hashes of Python's, for this run only."""

    def __init__(self, sightings: _Sightings) -> None:
        self._sightings = sightings
        self._prompts: dict[int, int] = {}
        self._pairs: dict[int, int] = {}

    def see(self, row: int, prompt: str, answer: str) -> None:
        pair = hash((prompt, answer))
        same = self._pairs.setdefault(pair, row)
        asked_before = self._prompts.setdefault(hash(prompt), row)
        if same != row:
            self._sightings.add("duplicates", row, prompt, first=same)
        elif asked_before != row:
            self._sightings.add("conflicting_answers", row, prompt, first=asked_before)


class _HeldOut:
    """The prompts of the validation rows, and which training rows give them away.

    Two prompts are nearly the same if they share most of their shingles (runs of three words; Broder, 1997).
    Shingles of many validation rows are left out of that count, so a row meets a few at most and time stays linear.
    """

    def __init__(self, prompts: Iterable[list[str]], rows: Iterable[int] | None, *, near: bool = True) -> None:
        self._rows = 0
        self._exact: defaultdict[str, list[int]] = defaultdict(list)
        self._holders: dict[tuple[str, ...], list[int]] = {}
        self._given_away: dict[int, tuple[int, str]] = {}
        self._nearly: dict[int, tuple[int, str]] = {}
        holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for row, words in _numbered(prompts, rows):
            self._rows += 1
            if words:
                self._exact[" ".join(words)].append(row)
            for shingle in _shingles(words) if near else ():
                holders[shingle].append(row)
        self._holders = {shingle: rows for shingle, rows in holders.items() if len(rows) <= COMMON}
        self._sizes = Counter(row for rows in self._holders.values() for row in rows)

    def see(self, row: int, words: list[str]) -> None:
        """A training row's prompt."""
        if not self._rows:
            return
        prompt = " ".join(words)
        for held in self._exact.get(prompt, ()):
            self._given_away.setdefault(held, (row, prompt))
        if not self._holders:
            return
        shared = Counter(held for shingle in _shingles(words) for held in self._holders.get(shingle, ()))
        for held, count in shared.items():
            if count >= max(ALIKE * self._sizes[held], ENOUGH_SHINGLES):
                self._nearly.setdefault(held, (row, prompt))

    def findings(self) -> Iterator[Finding]:
        sightings = _Sightings()
        for name, leaks in (("leaked", self._given_away), ("nearly_leaked", self._nearly)):
            for held, (row, prompt) in sorted(leaks.items()):
                if name == "leaked" or held not in self._given_away:
                    sightings.add(name, held, prompt, training_row=row)
        return sightings.findings(self._rows)


def _shingles(words: list[str]) -> set[tuple[str, ...]]:
    """Runs of words, also over both ends: one other word costs as many wherever it stands.

    So prompts of fewer than 18 words that differ in one are not nearly the same: they are often a template, filled in.
    """
    padded = ["", "", *words, "", ""]
    return set(zip(padded, padded[1:], padded[2:], strict=False))


class _Variety:
    """Openings, answers and words, counted up to a fixed number so that their shares compare between data sets."""

    def __init__(self) -> None:
        self._rows = 0
        self._openings: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self._vocabulary: set[str] = set()
        self._words = 0

    def see(self, prompt_words: list[str], answer: str) -> None:
        if self._rows == VARIETY_ROWS:
            return
        self._rows += 1
        self._openings[" ".join(prompt_words[:3])] += 1
        self._answers[_shorten(answer)] += 1
        self.count_words([*prompt_words, *words_of(answer)])

    def count_words(self, words: list[str]) -> None:
        if self._words < VARIETY_WORDS:
            self._words += len(words)
            self._vocabulary.update(words)

    def findings(self) -> Iterator[Finding]:
        if self._rows < ENOUGH_ROWS:
            return
        distinct, [(opening, count)] = len(self._openings), self._openings.most_common(1)
        if distinct < FEW_OPENINGS * self._rows or count > self._rows / 2:
            yield Finding(
                "repeated_openings",
                "note",
                f"prompts begin in few ways: {distinct:,} in {self._rows:,} rows, and {count / self._rows:.0%} of them "
                f"with {opening!r}",
                {"rows": self._rows, "distinct_openings": distinct, "most_common": opening, "count": count},
                "If users will ask in other words, put each instruction in several ways.",
            )
        [(answer, count)] = self._answers.most_common(1)
        share = count / self._rows
        if answer and share >= 0.1:
            level: Level = "warning" if share >= 0.5 else "note"
            yield Finding(
                "repeated_answer",
                level,
                f"{share:.0%} of the answers are the same: {answer!r}",
                {"rows": self._rows, "count": count, "answer": answer},
                "A model can lower its loss by always saying this; give fewer such rows, or more of the others.",
            )
        yield from self.few_words()

    def few_words(self) -> Iterator[Finding]:
        distinct = len(self._vocabulary)
        if self._words >= 1000 and distinct < FEW_WORDS * self._words:
            yield Finding(
                "few_words",
                "note",
                f"the text has only {distinct:,} distinct words in its first {self._words:,}",
                {"words": self._words, "distinct_words": distinct},
                "Expect little variety from a model of this text; more varied rows help more than more epochs.",
            )


def _long_rows(numbers: array[int], lengths: array[int], max_chars: int | None) -> Iterator[Finding]:
    if not lengths:
        return
    median = median_low(lengths)
    limit = max_chars or max(LONG * median, ALWAYS_SHORT)
    count = sum(length > limit for length in lengths)
    if not count:
        return
    longest = nlargest(EXAMPLES, zip(numbers, lengths, strict=True), key=lambda pair: pair[1])
    row, length = longest[0]
    yield Finding(
        "long_rows",
        "note",
        f"rows of more than {limit:,} characters: {count:,} of {len(lengths):,} (the median is {median:,}), the "
        f"longest is row {row} with {length:,}",
        {
            "count": count,
            "rows": len(lengths),
            "limit": limit,
            "median": median,
            "examples": [{"row": row, "characters": length} for row, length in longest],
        },
        "They are cut at --max_seq_len, and without packing every row of their batch is padded to them; shorten or "
        "drop them.",
    )


def _shorten(text: str) -> str:
    line = " ".join(text[: 2 * SHOWN_CHARS].split())
    return line if len(line) <= SHOWN_CHARS and len(text) <= 2 * SHOWN_CHARS else line[: SHOWN_CHARS - 1] + "…"
