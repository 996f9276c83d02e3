"""Read local files as text, piece by piece, and say exactly where one is broken."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seedbed.data.documents import split_documents, split_lines
from seedbed.errors import DataError, MissingExtra, TooLittleTextError
from seedbed.parsing import parse_json

TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")

CHUNK_BYTES = 2**18

Row = dict[str, Any]
"""A row of a table: values by the names of their columns."""


def read_documents(path: Path, text_column: str, document: str) -> Iterator[str]:
    """The documents of one file: pieces of a text (`documents.split_documents`), or rows of a table."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return read_parquet_texts(path, text_column)
    if suffix in JSON_SUFFIXES:
        return (_text_of_row(row, text_column, where) for where, row in read_json_rows(path))
    return split_documents(read_text(path), document, path.stat().st_size)


def read_text(path: Path) -> Iterator[str]:
    r"""The text of a UTF-8 file in chunks, without byte order mark and with \n for every \r\n.

    Raises DataError for a file that is binary (a NUL byte) or not UTF-8, with the byte and the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1  # of the first byte that is not decoded yet
    held = ""  # a carriage return at the end of a chunk, whose newline may come in the next
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            _refuse_binary(path, chunk, offset)
            undecoded = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                _refuse_encoding(path, error, offset - undecoded, line)
            if offset == 0:
                text = text.removeprefix("\ufeff")
            line += text.count("\n")
            offset += len(chunk)
            text = held + text
            held = "\r" if chunk and text.endswith("\r") else ""
            if held:
                text = text[:-1]
            if text:
                yield text.replace("\r\n", "\n")
            if not chunk:
                return


def refuse_if_not_text(path: Path) -> None:
    """Look at a file's beginning. Raises DataError if it is empty, cannot be opened, or is binary."""
    try:
        if path.stat().st_size == 0:
            raise TooLittleTextError(f"{path} is empty; give a file with text in it")
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() != ".parquet":
        _refuse_binary(path, head, 0)


def _refuse_binary(path: Path, chunk: bytes, offset: int) -> None:
    if offset == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path} is UTF-16 text, and UTF-8 is expected; convert it: iconv -f UTF-16 -t UTF-8 {path} > converted.txt"
        )
    place = chunk.find(b"\0")
    if place >= 0:
        raise DataError(
            f"{path} is a binary file, not text: it has a NUL byte at byte {offset + place}. "
            "Give a text file in UTF-8, .jsonl or .parquet"
        )


def _refuse_encoding(path: Path, error: UnicodeDecodeError, offset: int, line: int) -> None:
    line += error.object[: error.start].count(b"\n")
    raise DataError(
        f"{path} is not UTF-8: 0x{error.object[error.start]:02x} at byte {offset + error.start}, line {line} "
        f"({error.reason}). Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > converted.txt"
    ) from None


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every row of a table with all its columns, and where it is, for messages.

    Raises DataError for a damaged file or row, MissingExtra for a Parquet file without pyarrow.
    """
    if path.suffix.lower() == ".parquet":
        return read_parquet_rows(path)
    return read_json_rows(path)


def read_json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a file with one JSON object a line (or of one JSON array of objects), and where each is.

    Raises DataError with the line of a row that is not JSON or not an object.
    """
    lines = split_lines(read_text(path), longest=2**63)
    is_first = True
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        if is_first and line.lstrip().startswith("["):
            yield from _read_json_array(path, "\n" * (number - 1) + line + "".join(lines))
            return
        is_first = False
        try:
            row = parse_json(line, unique=True)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not a JSON object: {_json_reason(error)}. "
                'Each line must be one row, like {"text": "..."}; correct or remove that line'
            ) from None
        yield _row(row, f"{path}, line {number}")


def _read_json_array(path: Path, content: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = parse_json(content, unique=True)
    except ValueError as error:
        raise DataError(f"{path} is not a JSON array: {_json_reason(error)}; correct it there") from None
    for number, row in enumerate(rows, start=1):
        yield _row(row, f"{path}, row {number}")


def _row(row: Any, where: str) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not an object with named columns")
    return where, row


def _json_reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg.removesuffix(' at')} at {where}column {error.colno}"
    return str(error)


def _text_of_row(row: Row, text_column: str, where: str) -> str:
    if text_column not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where} has no column {text_column!r}; it has: {columns}. Name one with --text_column")
    text = row[text_column]
    if not isinstance(text, str):
        raise DataError(f"{where}: column {text_column!r} holds a {type(text).__name__}, and text is expected")
    return clean_text(text, where)


def clean_text(text: str, where: str) -> str:
    r"""The text with \n for every \r\n. Raises DataError when it is not valid Unicode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} is not valid Unicode: half a surrogate pair at character {error.start}; "
                "correct or remove that row"
            ) from None
    return text.replace("\r\n", "\n")


def read_parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every row of a Parquet file, and where it is. Raises as `read_parquet_texts`."""
    with _open_parquet(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def read_parquet_texts(path: Path, text_column: str) -> Iterator[str]:
    """The text column of a Parquet file; a missing value is no document.

    Raises MissingExtra without pyarrow, DataError for a damaged file or a column that is absent or not text.
    """
    with _open_parquet(path) as file:
        import pyarrow

        schema = file.schema_arrow
        if text_column not in schema.names:
            raise DataError(
                f"{path} has no column {text_column!r}; it has: {', '.join(schema.names)}. Name one with --text_column"
            )
        kind = schema.field(text_column).type
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise DataError(f"{path}: column {text_column!r} holds {kind}, and text is expected")
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield text.replace("\r\n", "\n")


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, its errors made ours."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("Parquet files", "parquet") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
