from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from seedbed.data import open_source, python_docs
from seedbed.errors import DataError


def test_it_is_a_real_text_without_repetition() -> None:
    documents = python_docs.python_docs()
    assert sum(len(text.encode()) for text in documents) > 1_500_000
    assert len(documents) > 300
    assert len(set(documents)) == len(documents)
    text = "\n\n".join(documents)
    assert ">>>" not in text
    assert "The module argparse\n\nCommand-line parsing library" in text
    letters = sum(character.isalpha() or character.isspace() for character in text)
    assert letters / len(text) > 0.9
    paragraphs = [part for document in documents for part in document.split("\n\n") if len(part) > 150]
    assert len(set(paragraphs)) > 0.995 * len(paragraphs)


def test_it_is_the_same_in_every_process() -> None:
    here = hashlib.sha256("\0".join(python_docs.python_docs()).encode()).hexdigest()
    program = (
        "import hashlib; from seedbed.data.python_docs import python_docs as docs;"
        'print(hashlib.sha256("\\0".join(docs()).encode()).hexdigest())'
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == here


def test_it_is_a_source() -> None:
    source = open_source("python-docs")
    assert list(source.documents()) == list(python_docs.python_docs())
    assert source.num_bytes == sum(len(text.encode()) for text in source.documents())
    assert not source.has_split("validation")


def test_a_python_without_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "_all_parts", lambda: iter([("The module x", [("", "A short text.")])]))
    with pytest.raises(DataError, match="built without it"):
        python_docs.python_docs.__wrapped__()


@pytest.mark.parametrize(
    ("doc", "prose"),
    [
        ("Return the\n    length.\n\n    >>> len([])\n    0\n", "Return the\nlength."),
        ("Title of it\n===========\n\nfoo(x, y) -> z\nSee the manual.", "Title of it\n\nSee the manual."),
        ("It reads:\n\n   stmt ::= 'x'\n\nand no more.", "It reads:\n\nand no more."),
        ("Use it so:\n\n   x = f(1)[2]\n   y = {3}", "Use it so:"),
        ("Two words", ""),
    ],
)
def test_prose(doc: str, prose: str) -> None:
    assert python_docs._prose(doc) == prose
