"""Files that are whole or not there, also after a power cut, their digests, and paths that begin at home."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expanded(path: str | Path) -> str:
    """The path with the user's home folder in place of a leading `~`; the name of an unknown user stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 (which does not raise for an unknown user)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; at the end it is on the disk and takes that name, or goes away on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text so that a reader sees the old or the new, never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have the disk know the bytes of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
