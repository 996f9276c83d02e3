from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from seedbed.data import documents
from seedbed.data.documents import passage_chars, split_documents, split_lines

WIKI = """\

 = First article =

 It begins . A formula stands alone :
 = 5 =
 and the text goes on .

 = = A section = =

 More text .

 = Second article =

 The end .
"""

PLAY = "".join(f"Speaker {i}:\nWords of number {i}, and then some more of them.\n\n\n" for i in range(400))


def chunked(text: str, seed: int = 0) -> Iterator[str]:
    """The text in pieces of random length, as a file might come."""
    rng = random.Random(seed)
    while text:
        size = rng.randint(1, 400)
        yield text[:size]
        text = text[size:]


def split(text: str, rule: str = "auto") -> list[str]:
    return list(split_documents([text], rule, len(text.encode())))


def assert_only_blank_lines_between(text: str, pieces: list[str]) -> None:
    """The pieces are in the text in order, whole lines, with nothing but blank lines around them."""
    place = 0
    for piece in pieces:
        assert piece
        assert not piece.isspace()
        start = text.index(piece, place)
        gap = text[place:start]
        assert gap == "" or gap.isspace()
        place = start + len(piece)
    assert text[place:] == "" or text[place:].isspace()


def test_wikitext_articles() -> None:
    found = split(WIKI)
    assert [text.split("\n")[0] for text in found] == [" = First article =", " = Second article ="]
    assert " = 5 =" in found[0]
    assert " = = A section = =" in found[0]
    assert_only_blank_lines_between(WIKI, found)


def test_one_heading_is_not_wikitext() -> None:
    text = "\n = Only one =\n\n text\n\n" + ("word\n" * 50 + "\n") * 4
    assert len(split(text)) == 4


def test_lines_that_are_the_end_of_text_token_separate() -> None:
    text = "one\n\nstill one <|endoftext|> here\n<|endoftext|>\ntwo\n\n\n<|endoftext|>\n<|endoftext|>\nthree"
    assert split(text) == ["one\n\nstill one <|endoftext|> here", "two", "three"]


def test_paragraphs_are_gathered_into_passages() -> None:
    found = split(PLAY)
    least = passage_chars(len(PLAY))
    assert 200 < least < 4096
    assert all(len(text) > least - 5 for text in found[:-1])
    assert 25 <= len(found) <= 40
    assert all(text.startswith("Speaker") and text.endswith("of them.") for text in found)
    assert_only_blank_lines_between(PLAY, found)


def test_passages_of_large_and_small_files() -> None:
    assert passage_chars(100) == 200
    assert passage_chars(80_000) == 2000
    assert passage_chars(10**9) == 4096


@pytest.mark.parametrize("rule", ["auto", "blank_line", "article", "line", "file"])
def test_nothing_is_lost_but_blank_lines(rule: str) -> None:
    for text in (PLAY, WIKI, "\n \n\n  one\n\n\ntwo  \nthree\n \n", "no newline at all", "a\n\n\nb\n"):
        found = split(text, rule)
        assert_only_blank_lines_between(text, found)
        for piece in found:
            assert piece in text


@pytest.mark.parametrize("rule", ["blank_line", "article", "line", "file"])
def test_the_chunks_do_not_matter(rule: str) -> None:
    for text in (PLAY, WIKI):
        for seed in range(3):
            assert list(split_documents(chunked(text, seed), rule, 0)) == split(text, rule)


def test_blank_line_and_line_and_file() -> None:
    text = "one\ntwo\n \n\nthree\n"
    assert split(text, "blank_line") == ["one\ntwo", "three"]
    assert split(text, "line") == ["one", "two", "three"]
    assert split(text, "file") == [text]


def test_text_that_is_only_white_space_has_no_documents() -> None:
    for rule in documents.RULES:
        assert split(" \n\n\t\n", rule) == []
        assert split("", rule) == []


def test_a_text_without_blank_lines_is_cut_at_newlines() -> None:
    text = "a line of text, forty characters long..\n" * 5000
    found = split(text)
    assert all(len(piece) <= documents.LONG + 40 for piece in found)
    assert "\n".join(found) + "\n" == text


def test_a_line_without_end_is_cut_anywhere() -> None:
    text = "x" * (2 * documents.LONGEST + 1000)
    found = list(split_documents((text[i : i + 100_000] for i in range(0, len(text), 100_000)), "auto", len(text)))
    assert "".join(found) == text
    assert max(map(len, found)) < 1.2 * documents.LONGEST


def test_lines_keep_what_is_not_a_newline() -> None:
    text = "a\x0bb\u2028c\rd\n\ne"
    assert list(split_lines(chunked(text))) == ["a\x0bb\u2028c\rd\n", "\n", "e"]
