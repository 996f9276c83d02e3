"""The tokenized store: a text as token ids on disk, made once and mapped into memory by every run.

CACHE/KEY/          KEY is the fingerprint of the text, the tokenizer and this format
  tokens.bin        each document's tokens and then the end-of-text token, uint16 or uint32
  offsets.bin       (documents + 1,) int64: where each begins in tokens.bin, in tokens
  digests.bin       (documents,) uint64: BLAKE2b of the text
  bytes.bin         (documents,) int64: size of the text in UTF-8
  words.bin         (documents,) int64: words of the text, between white space
  store.json        written last: what the others must look like
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from seedbed.data.sources import Source
from seedbed.errors import StorageError
from seedbed.text.tokenizer import Tokenizer, batches_of_text

FORMAT = 1
INDEX = {"offsets": np.int64, "digests": np.uint64, "bytes": np.int64, "words": np.int64}

# A longer document is encoded in pieces, so that one huge document needs no huge memory.
PIECE_CHARS = 2**18

Progress = Callable[[int, int], None]


@final
@dataclass(frozen=True)
class Store:
    """A tokenized text. Arrays over documents are in the order of the source; all are mapped, read-only."""

    path: Path
    eos_id: int
    vocab_size: int
    stream: NDArray[np.uint16] | NDArray[np.uint32] = field(repr=False)  # (tokens,)
    offsets: NDArray[np.int64] = field(repr=False)  # (documents + 1,)
    digests: NDArray[np.uint64] = field(repr=False)  # (documents,)
    num_bytes: NDArray[np.int64] = field(repr=False)  # (documents,)
    num_words: NDArray[np.int64] = field(repr=False)  # (documents,)

    @property
    def num_documents(self) -> int:
        return len(self.digests)

    @property
    def num_tokens(self) -> int:
        """All tokens, one end of text for each document among them."""
        return len(self.stream)

    def tokens(self, document: int) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """The tokens of one document and its end of text, (n + 1,)."""
        return self.stream[self.offsets[document] : self.offsets[document + 1]]


def open_store(
    source: Source, tokenizer: Tokenizer, *, cache: Path | None = None, progress: Progress | None = None
) -> Store:
    """The store of a source under a tokenizer: found in `cache`, or made there.

    cache: $SEEDBED_CACHE or ~/.cache/seedbed when not given.
    progress: called with (bytes done, bytes in all) while the store is made.

    Safe for several processes at once: one makes it, the others wait and use it. A store that is damaged is
    made again with a warning. Raises DataError for broken text, StorageError when it cannot be written.
    """
    cache = cache or Path(os.environ.get("SEEDBED_CACHE") or Path("~/.cache/seedbed").expanduser())
    key = _key(source, tokenizer)
    folder = cache / key
    if folder.is_dir() and (store := _open(folder)):
        return store
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            if folder.is_dir():
                if store := _open(folder):
                    return store
                warnings.warn(f"the tokenized store {folder} is damaged; making it again", stacklevel=2)
                shutil.rmtree(folder)
            _remove_dead_builds(cache, key)
            _build(folder, source, tokenizer, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise
        raise StorageError(
            f"cannot write the tokenized text to {cache}: {error.strerror}. Make room there (about the "
            "size of the text), or name another folder in $SEEDBED_CACHE"
        ) from None
    store = _open(folder)
    assert store is not None, folder
    return store


def _key(source: Source, tokenizer: Tokenizer) -> str:
    parts = (FORMAT, PIECE_CHARS, source.fingerprint(), tokenizer.fingerprint, tokenizer.eos_id)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path) -> Store | None:
    """The store in a folder, or None if any file is not what store.json says."""
    try:
        facts = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in facts["sizes"].items()):
            return None
        stream = _map(folder / "tokens.bin", facts["dtype"])
        index = {name: _map(folder / f"{name}.bin", dtype) for name, dtype in INDEX.items()}
        if len(index["offsets"]) != facts["documents"] + 1 or index["offsets"][-1] != len(stream):
            return None
        return Store(
            path=folder,
            eos_id=facts["eos_id"],
            vocab_size=facts["vocab_size"],
            stream=stream,
            offsets=index["offsets"],
            digests=index["digests"],
            num_bytes=index["bytes"],
            num_words=index["words"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    # A plain array over the mapping: np.memmap's own indexing costs more than reading a row.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _build(folder: Path, source: Source, tokenizer: Tokenizer, progress: Progress | None) -> None:
    """Make the store beside its place and move it there whole, so that no half of one is ever seen."""
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent) as name:
        private = Path(name) / folder.name
        private.mkdir()
        facts = _tokenize(private, source, tokenizer, progress)
        facts["sizes"] = {path.name: path.stat().st_size for path in sorted(private.iterdir())}
        with (private / "store.json").open("wb") as file:
            file.write(json.dumps(facts, indent=2).encode())
            _flush(file)
        _flush_folder(private)
        # Where locks do not work another process may have been first; the same key is the same content.
        with contextlib.suppress(FileExistsError):
            try:
                private.rename(folder)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        _flush_folder(folder.parent)


@dataclass
class _Batch:
    """Some documents, ready to be encoded."""

    pieces: list[str]
    pieces_in: list[int]
    digests: list[int]
    num_bytes: list[int]
    num_words: list[int]


def _tokenize(folder: Path, source: Source, tokenizer: Tokenizer, progress: Progress | None) -> dict[str, Any]:
    """Write tokens.bin and the index; returns what store.json says, all but the sizes of the files."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    total, done, num_documents, num_tokens = source.num_bytes, 0, 0, 0
    batches = _prepare(source.documents())
    # The next batch is read and prepared by a thread while the tokenizer, which is not Python, has the cores.
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ("tokens", *INDEX)}
        files["offsets"].write(bytes(8))
        reader = stack.enter_context(ThreadPoolExecutor(1))
        upcoming = reader.submit(next, batches, None)
        while batch := upcoming.result():
            upcoming = reader.submit(next, batches, None)
            encoded = iter(tokenizer.encode_batch(batch.pieces))
            ids: list[int] = []
            ends: list[int] = []
            for count in batch.pieces_in:
                for _ in range(count):
                    ids += next(encoded)
                ids.append(tokenizer.eos_id)
                ends.append(num_tokens + len(ids))
            columns = (ends, batch.digests, batch.num_bytes, batch.num_words)
            files["tokens"].write(np.array(ids, dtype=dtype).tobytes())
            for (name, index_dtype), column in zip(INDEX.items(), columns, strict=True):
                files[name].write(np.array(column, dtype=index_dtype).tobytes())
            num_tokens += len(ids)
            num_documents += len(ends)
            done += sum(batch.num_bytes)
            if progress:
                progress(min(done, total), total)
        for file in files.values():
            _flush(file)
    if progress:
        progress(total, total)
    return {
        "format": FORMAT,
        "source": source.name,
        "split": source.split,
        "documents": num_documents,
        "tokens": num_tokens,
        "bytes": done,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }


def _prepare(documents: Iterator[str]) -> Iterator[_Batch]:
    for texts in batches_of_text(documents):
        pieces = [split_long(text) for text in texts]
        raw = [text.encode() for text in texts]
        yield _Batch(
            pieces=[piece for some in pieces for piece in some],
            pieces_in=[len(some) for some in pieces],
            digests=[digest(data) for data in raw],
            num_bytes=[len(data) for data in raw],
            num_words=[len(text.split()) for text in texts],
        )


def digest(text: bytes) -> int:
    """64 bits of BLAKE2b that stand for a document's text."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def split_long(text: str, limit: int = PIECE_CHARS) -> list[str]:
    """Cut a long document where every usual tokenizer would: before a single space between two words.

    So the pieces' tokens, put together, are the tokens of the whole. A text without such a place within
    4096 characters of the limit is cut at the limit.
    """
    pieces = []
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for place in range(end, end - 4096, -1):
            if text[place] == " " and text[place - 1].isalpha() and text[place + 1 : place + 2].isalpha():
                end = place
                break
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock that dies with its process; yields whether it is held."""
    try:
        import fcntl
    except ImportError:  # Windows: the rename alone keeps stores whole
        yield False
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:  # in use, or a file system without locks
            held = False
        yield held


def _remove_dead_builds(cache: Path, own_key: str) -> None:
    """Delete what killed processes had half made: builds whose lock nobody holds, or the caller itself."""
    for path in cache.glob("*.tmp"):
        key = path.name.partition(".")[0]
        with _locked(cache / f"{key}.lock", wait=False) as free:
            if free or key == own_key:
                shutil.rmtree(path, ignore_errors=True)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
