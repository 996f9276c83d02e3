"""Where text comes from: a file, a folder, a glob, or a named source, all read in the same way."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import final

from seedbed.data.conversations import FORMATS, detect_format, read_conversations
from seedbed.data.documents import RULES
from seedbed.data.files import (
    JSON_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    read_documents,
    refuse_if_not_text,
)
from seedbed.data.named import NAMED, HubRows, load_hub_documents
from seedbed.data.python_docs import python_docs
from seedbed.disk import expanded, sha256_of
from seedbed.errors import ConfigError, DataError, TooLittleTextError, did_you_mean


@final
@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, in the same order. Made by `open_source`.

    A document is a text or, in every format but `text`, a conversation (`conversations.from_document`).
    """

    name: str
    split: str
    splits: tuple[str, ...]
    format: str
    _read: Callable[[], Iterator[str]] = field(repr=False)
    _hash: Callable[[], str] = field(repr=False)
    _size: Callable[[], int] = field(repr=False)

    def documents(self) -> Iterator[str]:
        """Each document's text, from the first. Raises DataError where the text is broken, or has none."""
        empty = True
        for text in self._read():
            if text and not text.isspace():
                empty = False
                yield text
        if empty:
            raise TooLittleTextError(f"there is no text in {self.name}: every document is empty")

    def fingerprint(self) -> str:
        """SHA-256 of the content and of how it is cut into documents, in hexadecimal; names do not count."""
        return self._hash()

    @property
    def num_bytes(self) -> int:
        """Size of what is read: of the files, or of the text when there is no file."""
        return self._size()

    def has_split(self, name: str) -> bool:
        """Whether its makers published such a split, to be opened with `open_source(spec, split=name)`."""
        return name in self.splits

    def derived(self, documents: Callable[[], Iterator[str]], facts: str) -> Source:
        """A source of documents made from these; `facts` (this fingerprint among them) say all that decides them."""
        fingerprint = hashlib.sha256(f"derived 1\n{facts}".encode()).hexdigest()
        return replace(self, _read=documents, _hash=lambda: fingerprint)


def open_source(
    spec: str,
    *,
    text_column: str = "text",
    document: str = "auto",
    split: str = "train",
    flag: str = "--data",
    format: str = "auto",
) -> Source:
    """Open a file, a folder (all its text files), a glob or a named source.

    text_column: which column of .jsonl and .parquet files holds the text; a row is a document.
    document: where text files are cut, one of `documents.RULES`.
    split: for named sources that have official ones.
    flag: which option `spec` was given with, for messages.
    format: what the files hold, one of `conversations.FORMATS`; `auto` looks at the beginning of each.

    Raises DataError when there is nothing to read or it is not text (the text itself is checked as it is
    read), ConfigError for an impossible option, MissingExtra when a library is needed.
    """
    if document not in RULES:
        raise ConfigError(
            f"--document {document} is unknown{did_you_mean(document, RULES)}; expected {', '.join(RULES)}"
        )
    if format not in FORMATS:
        raise ConfigError(f"--format {format} is unknown{did_you_mean(format, FORMATS)}; expected {', '.join(FORMATS)}")
    if spec in NAMED and not Path(spec).exists():
        if format not in ("auto", "text"):
            raise ConfigError(f"--format {format} is for files; {spec} is text")
        return _open_named(spec, document, split)
    if split != "train":
        raise ConfigError(f"{spec} has no split {split!r}: only named sources have official splits. Use --val_data")
    return _open_files(spec, _find_texts(spec, flag), text_column, document, format)


def _open_files(spec: str, paths: Sequence[Path], text_column: str, document: str, format: str) -> Source:
    if document != "auto" and all(path.suffix.lower() in TABLE_SUFFIXES for path in paths):
        raise ConfigError(f"--document {document} is for text files; in {spec} each row is a document")
    resolved = _common_format(spec, paths, text_column) if format == "auto" else format
    if document != "auto" and resolved != "text":
        raise ConfigError(f"--document {document} is for text; in {spec} each conversation ({resolved}) is a document")

    def documents(path: Path) -> Iterator[str]:
        if resolved == "text":
            return read_documents(path, text_column, document)
        return read_conversations(path, resolved)

    return Source(
        name=spec,
        split="train",
        splits=("train",),
        format=resolved,
        _read=lambda: (document for path in paths for document in documents(path)),
        _hash=cache(lambda: _hash_files(paths, text_column, document, resolved)),
        _size=lambda: sum(path.stat().st_size for path in paths),
    )


def open_whole(
    spec: str,
    *,
    text_column: str = "text",
    document: str | None = None,
    split: str | None = None,
    format: str = "auto",
) -> Source:
    """A source to measure a model on: a text file is one document, unless `document` says otherwise.

    Conversations, rows of tables and the documents of named sources are what they are; of a named source's
    splits `test` is taken, else `validation`, else `train`. Raises as `open_source` does.
    """
    if spec in NAMED and not Path(spec).exists():
        best = next(name for name in ("test", "validation", "train") if name in NAMED[spec].splits)
        return open_source(spec, document=document or "auto", split=split or best, format=format)
    paths = _find_texts(spec, "--data")
    if format == "auto":
        format = _common_format(spec, paths, text_column)
    in_pieces = format != "text" or all(path.suffix.lower() in TABLE_SUFFIXES for path in paths)
    rule = document or ("auto" if in_pieces else "file")
    return open_source(spec, text_column=text_column, document=rule, split=split or "train", format=format)


def from_texts(texts: Sequence[str], name: str = "texts") -> Source:
    """A source of documents that are in memory already."""
    return Source(
        name=name,
        split="train",
        splits=("train",),
        format="text",
        _read=lambda: iter(texts),
        _hash=cache(lambda: _hash_texts(texts)),
        _size=lambda: sum(len(text.encode()) for text in texts),
    )


def _open_named(name: str, document: str, split: str) -> Source:
    named = NAMED[name]
    if split not in named.splits:
        raise ConfigError(f"{name} has no split {split!r}; it has: {', '.join(named.splits)}")
    if document != "auto":
        raise ConfigError(f"--document {document} is for text files; the documents of {name} are known")
    if not isinstance(named.rows, HubRows):
        return from_texts(python_docs(), name)
    documents = load_hub_documents(name, named.rows, named.splits[split])
    return Source(
        name=name,
        split=split,
        splits=tuple(named.splits),
        format="text",
        _read=documents,
        _hash=cache(lambda: _hash_texts(documents())),
        _size=lambda: sum(len(text.encode()) for text in documents()),
    )


def _find_texts(spec: str, flag: str) -> list[Path]:
    """The files that `spec` means, none of which looks like anything but text."""
    paths = find_files(spec, flag)
    for path in paths:
        refuse_if_not_text(path)
    return paths


def _common_format(spec: str, paths: Sequence[Path], text_column: str) -> str:
    """The format of all files, found by looking into each."""
    first_of: dict[str, Path] = {}
    for path in paths:
        first_of.setdefault(detect_format(path, text_column), path)
    if len(first_of) > 1:
        found = ", ".join(f"{path} is {format}" for format, path in first_of.items())
        raise DataError(f"the files of {spec} differ: {found}. Give files of one kind, or say which with --format")
    return next(iter(first_of))


def find_files(spec: str, flag: str) -> list[Path]:
    """The files a spec means, in an order that is the same on every machine."""
    path = Path(expanded(spec))
    if path.is_file():
        return [path]
    if path.is_dir():
        suffixes = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
        inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        paths = [file for file in inside if file.is_file() and file.suffix.lower() in suffixes]
        paths = [file for file in paths if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        # A .json beside a text is more often a description of it than rows of text.
        paths = [file for file in paths if file.suffix.lower() != ".json"] or paths
        if not paths:
            raise DataError(f"there are no text files in {spec}; expected names that end in {', '.join(suffixes)}")
        return paths
    if glob.has_magic(spec):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        paths = [file for file in found if file.is_file()]
        if not paths:
            raise DataError(f"no file matches {spec} (from {Path.cwd()}); check the pattern, and quote it in a shell")
        return paths
    raise DataError(_missing(spec, path, flag))


def _missing(spec: str, path: Path, flag: str) -> str:
    if path.exists():
        return f"{flag} {spec}: neither a file nor a folder; text that comes through a pipe has to be in a file first"
    near = did_you_mean(spec, list(NAMED))
    if not near and path.parent.is_dir():
        beside = {other.name: str(other) for other in path.parent.iterdir() if other.exists()}
        guess = did_you_mean(path.name, list(beside)).removeprefix("; did you mean ").removesuffix("?")
        near = f"; did you mean {beside[guess]}?" if guess else ""
    hint = near or f"; expected a file, a folder, a glob, or one of {', '.join(NAMED)}"
    return f"{flag} {spec}: there is no such file or named source{hint}"


def _hash_files(paths: Sequence[Path], text_column: str, document: str, format: str) -> str:
    total = hashlib.sha256(b"files 1" if format == "text" else f"conversations 1 {format}".encode())
    for path in paths:
        suffix = path.suffix.lower()
        kind = "json" if suffix in JSON_SUFFIXES else suffix if suffix in TABLE_SUFFIXES else "text"
        option = "" if format != "text" else document if kind == "text" else text_column
        total.update(f"\n{kind} {option} {sha256_of(path)}".encode())
    return total.hexdigest()


def _hash_texts(texts: Sequence[str] | Iterator[str]) -> str:
    total = hashlib.sha256(b"texts 1")
    for text in texts:
        data = text.encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()
