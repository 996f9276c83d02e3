"""Where one document ends and the next begins, found while a text streams by.

A document is what a model reads from a fresh start: it neither sees nor predicts across the boundary.
Whatever the rule, the documents of a file are consecutive pieces of its text, whole lines of it, and between
them there is nothing but blank lines (and, for one rule, separator lines). The one exception: a line of more
than 1 Mi characters is cut within.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

RULES = ("auto", "file", "blank_line", "article", "line")

SEPARATOR = "<|endoftext|>"

# A level-1 heading of WikiText, ` = Title = `; deeper ones are ` = = Section = = `.
HEADING = re.compile(r"\s?= (?!= ).+(?<! =) =")

LONG = 2**16  # characters after which a text without blank lines is cut at the next newline
LONGEST = 2**20  # characters after which any document is cut, so that memory stays bounded

# One of these in a stream of lines says that a document ends there; a real line is never empty.
_CUT = ""


def split_documents(chunks: Iterable[str], rule: str, num_bytes: int) -> Iterator[str]:
    """The documents of one file, given its text in chunks of any length and its size.

    `auto` decides on the first chunk: WikiText articles if it has two level-1 headings; the pieces between
    lines that are exactly `<|endoftext|>`, if it has one; otherwise passages (see `passage_chars`).
    """
    assert rule in RULES, rule
    if rule == "file":
        text = "".join(chunks)
        return iter([] if not text or text.isspace() else [text])
    chunks = iter(chunks)
    head = next(chunks, "")
    lines = split_lines(chain([head], chunks))
    if rule == "auto":
        rule = _recognise(head)
    if rule == "line":
        return (line.removesuffix("\n") for line in lines if not line.isspace())
    if rule == "article":
        return _gather(_cut_before_headings(lines), LONGEST)
    if rule == "separator":
        return _gather(_cut_at_separators(lines), LONGEST)
    if rule == "blank_line":
        return _gather(_cut_at_blank_lines(lines, 0), LONGEST)
    return _gather(_cut_at_blank_lines(lines, passage_chars(num_bytes)), LONG)


def passage_chars(num_bytes: int) -> int:
    """Characters a passage of a plain text has at least, before a blank line ends it.

    Paragraphs alone make poor documents: a speech of Shakespeare is 150 characters, and a model trained on
    such never has anything to look back at. So consecutive paragraphs are gathered up to 4096 characters,
    about a thousand tokens; in a small file to less, so that there are some 40 documents to hold some out of.
    """
    return min(max(num_bytes // 40, 200), 4096)


def split_lines(chunks: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
    """Lines with their newline; a line beyond `longest` characters comes in pieces without one."""
    tail = ""
    for chunk in chunks:
        *lines, tail = (tail + chunk).split("\n")
        for line in lines:
            yield line + "\n"
        if len(tail) > longest:
            yield tail
            tail = ""
    if tail:
        yield tail


def _recognise(head: str) -> str:
    lines = [line + "\n" for line in head.split("\n")]
    if sum(line == _CUT for line in _cut_before_headings(lines)) >= 2:
        return "article"
    if SEPARATOR + "\n" in lines:
        return "separator"
    return "passage"


def _gather(lines: Iterable[str], long: int) -> Iterator[str]:
    """Join lines into documents at the cuts, and at a newline beyond `long` characters."""
    document: list[str] = []
    size = 0
    for line in chain(lines, [_CUT]):
        if line != _CUT and (document or not line.isspace()):
            document.append(line)
            size += len(line)
        if line == _CUT or size > LONGEST or (size > long and line.endswith("\n")):
            while document and document[-1].isspace():
                document.pop()
            if document:
                yield "".join(document).removesuffix("\n")
            document, size = [], 0


def _cut_at_blank_lines(lines: Iterable[str], at_least: int) -> Iterator[str]:
    size = 0
    for line in lines:
        yield line
        size += len(line)
        if size > at_least and line.isspace():
            yield _CUT
            size = 0


def _cut_at_separators(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield _CUT if line.rstrip("\n") == SEPARATOR else line


def _cut_before_headings(lines: Iterable[str]) -> Iterator[str]:
    """A heading stands between blank lines; a formula that looks like one is in the middle of a text."""
    blank_before = True
    for line, after in pairwise(chain(lines, ["\n"])):
        if blank_before and line.startswith((" =", "=")) and after.isspace() and HEADING.fullmatch(line.rstrip()):
            yield _CUT
        yield line
        blank_before = line.isspace()
