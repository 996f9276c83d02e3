"""The tokenized store: a text as token ids on disk, made once and mapped into memory by every run.

CACHE/KEY/          KEY is the fingerprint of the text, the tokenizer, the template and this format
  tokens.bin        what is predicted: each document's tokens and then its end, uint16 or uint32
  offsets.bin       (documents + 1,) int64: where each begins in tokens.bin, in tokens
  starts.bin        (documents,) int64: the token that stands before each: end of text, or its template's first
  digests.bin       (documents,) uint64: BLAKE2b of the text, or of a conversation's questions; decides the split
  bytes.bin         (documents,) int64: size of the text in UTF-8; of a conversation's, as it was read
  target_bytes.bin  (documents,) int64: the part of it that the loss counts
  mask.bin          conversations only, bool: whether each token of tokens.bin is a target of the loss
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
from array import array
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from seedbed.data.conversations import from_document, split_key
from seedbed.data.sources import Source
from seedbed.disk import flush, sha256_of
from seedbed.errors import StorageError
from seedbed.parsing import parse_json
from seedbed.text.template import Template
from seedbed.text.tokenizer import Tokenizer, batches_of_text

FORMAT = 3
INDEX = {"offsets": np.int64, "starts": np.int64, "digests": np.uint64, "bytes": np.int64, "target_bytes": np.int64}
CONVERSATIONS_AT_ONCE = 256

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
    starts: NDArray[np.int64] = field(repr=False)  # (documents,)
    digests: NDArray[np.uint64] = field(repr=False)  # (documents,)
    num_bytes: NDArray[np.int64] = field(repr=False)  # (documents,)
    target_bytes: NDArray[np.int64] = field(repr=False)  # (documents,)
    mask: NDArray[np.bool_] | None = field(repr=False)  # (tokens,); None where every token is a target
    without_end: int  # conversations with an answer whose end is not a target

    @property
    def num_documents(self) -> int:
        return len(self.digests)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each document has, (documents,)."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """All tokens, one end of text for each document among them."""
        return len(self.stream)

    def tokens(self, document: int) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """What is predicted of one document: a text's tokens and its end of text, (n,)."""
        return self.stream[self.offsets[document] : self.offsets[document + 1]]

    def trained(self, document: int) -> NDArray[np.bool_]:
        """Which of the document's tokens are targets of the loss, (n,)."""
        first, end = self.offsets[document : document + 2]
        return np.ones(end - first, dtype=np.bool_) if self.mask is None else self.mask[first:end]


@dataclass(frozen=True)
class Reading:
    """How documents become tokens: texts by the tokenizer alone, conversations through a template."""

    tokenizer: Tokenizer
    template: Template | None = None
    train_on_prompt: bool = False

    def key(self) -> tuple[object, ...]:
        """What the tokens depend on."""
        template = (self.template.fingerprint, self.train_on_prompt) if self.template else ()
        return (self.tokenizer.fingerprint, self.tokenizer.eos_id, *template)


def open_store(
    source: Source, reading: Reading, *, cache: Path | None = None, progress: Progress | None = None
) -> Store:
    """The store of a source as it is read: found in `cache`, or made there.

    cache: $SEEDBED_CACHE or ~/.cache/seedbed when not given.
    progress: called with (bytes done, bytes in all) while the store is made.

    Safe for several processes at once: one makes it, the others wait and use it. A store that is damaged is
    made again with a warning. Raises DataError for broken text, StorageError when it cannot be written.
    """
    cache = cache or cache_folder()
    key = _key(source, reading)
    folder = cache / key
    if folder.is_dir() and (store := _open(folder, reading)):
        return store
    _make_cache(cache)
    try:
        with _locked(cache / f"{key}.lock"):
            if folder.is_dir():
                if store := _open(folder, reading):
                    return store
                warnings.warn(f"the tokenized store {folder} is damaged; making it again", stacklevel=2)
                shutil.rmtree(folder)
            _remove_dead_builds(cache, key)
            _build(folder, source, reading, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise
        raise StorageError(
            f"cannot write the tokenized text to {cache}: {error.strerror}. Make room there (about the "
            "size of the text), or name another folder in $SEEDBED_CACHE"
        ) from None
    store = _open(folder, reading)
    assert store is not None, folder
    return store


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the folder {cache} for tokenized text cannot be made: {error.strerror}; name another in $SEEDBED_CACHE"
        ) from None


def cache_folder() -> Path:
    """$SEEDBED_CACHE or ~/.cache/seedbed.

    Raises:
        StorageError: the user has no home, as some containers' have not.
    """
    try:
        return Path(os.environ.get("SEEDBED_CACHE") or Path("~/.cache/seedbed").expanduser())
    except RuntimeError:
        raise StorageError(
            "there is no home folder to keep tokenized text in; name a folder for it in $SEEDBED_CACHE"
        ) from None


def _key(source: Source, reading: Reading) -> str:
    parts = (FORMAT, PIECE_CHARS, source.fingerprint(), *reading.key())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path, reading: Reading) -> Store | None:
    """The store in a folder, or None if any byte of it is not what was written."""
    try:
        facts = parse_json((folder / "store.json").read_text(encoding="utf-8"))
        known = (reading.tokenizer.eos_id, reading.tokenizer.vocab_size)
        if (facts["eos_id"], facts["vocab_size"]) != known or facts["files"] != _digests(folder):
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
            starts=index["starts"],
            digests=index["digests"],
            num_bytes=index["bytes"],
            target_bytes=index["target_bytes"],
            mask=_map(folder / "mask.bin", np.bool_) if "mask.bin" in facts["files"] else None,
            without_end=facts["without_end"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but store.json, in hexadecimal."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*.bin"))}


def _map(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    # A plain array over the mapping: np.memmap's own indexing costs more than reading a row.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _build(folder: Path, source: Source, reading: Reading, progress: Progress | None) -> None:
    """Make the store beside its place and move it there whole, so that no half of one is ever seen."""
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent) as name:
        private = Path(name) / folder.name
        private.mkdir()
        facts = _tokenize(private, source, reading, progress)
        facts["files"] = _digests(private)
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
    """Some documents as they stand in the store; every list but `ids` and `mask` has one entry a document."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    mask: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    target_bytes: list[int] = field(default_factory=list)
    without_end: int = 0


def _tokenize(folder: Path, source: Source, reading: Reading, progress: Progress | None) -> dict[str, Any]:
    """Write tokens.bin and the index; returns what store.json says, all but the sizes of the files."""
    tokenizer, masked = reading.tokenizer, reading.template is not None
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    total, done, num_documents, num_tokens, without_end = source.num_bytes, 0, 0, 0, 0
    batches = _conversations(source, reading) if masked else _texts(source, tokenizer)
    with contextlib.ExitStack() as stack, contextlib.closing(batches):
        names = ("tokens", *INDEX, *(["mask"] if masked else []))
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names}
        files["offsets"].write(bytes(8))
        for batch in batches:
            ends = num_tokens + np.cumsum(batch.lengths)
            columns = (ends, batch.starts, batch.digests, batch.num_bytes, batch.target_bytes)
            files["tokens"].write(np.array(batch.ids, dtype=dtype).tobytes())
            if masked:
                files["mask"].write(np.array(batch.mask, dtype=np.bool_).tobytes())
            for (name, index_dtype), column in zip(INDEX.items(), columns, strict=True):
                files[name].write(np.array(column, dtype=index_dtype).tobytes())
            num_tokens += len(batch.ids)
            num_documents += len(ends)
            without_end += batch.without_end
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
        "without_end": without_end,
    }


def _texts(source: Source, tokenizer: Tokenizer) -> Generator[_Batch]:
    """Texts as tokens, each with its end of text; the start marker of each is an end of text, too."""
    pieces_of = (
        (texts, [split_long(text) for text in texts], [text.encode() for text in texts])
        for texts in batches_of_text(source.documents())
    )
    # The next batch is read and prepared by a thread while the tokenizer, which is not Python, has the cores.
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, pieces_of, None)
        while prepared := upcoming.result():
            upcoming = reader.submit(next, pieces_of, None)
            texts, pieces, raw = prepared
            # A document larger than a batch is encoded a part at a time, and its numbers kept in four bytes each.
            parts = batches_of_text(piece for some in pieces for piece in some)
            encoded = (piece_ids for part in parts for piece_ids in tokenizer.encode_batch(part))
            batch = _Batch(starts=[tokenizer.eos_id] * len(texts), digests=[digest(data) for data in raw])
            batch.num_bytes = batch.target_bytes = [len(data) for data in raw]
            for some in pieces:
                before = len(batch.ids)
                for _ in some:
                    batch.ids.extend(next(encoded))
                batch.ids.append(tokenizer.eos_id)
                batch.lengths.append(len(batch.ids) - before)
            yield batch


def _conversations(source: Source, reading: Reading) -> Generator[_Batch]:
    """Conversations through the template: the first token is only seen, unless an answer begins with it."""
    assert reading.template is not None
    tokenizer, learn_all = reading.tokenizer, reading.train_on_prompt
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    remaining = source.documents()
    while documents := list(islice(remaining, CONVERSATIONS_AT_ONCE)):
        batch = _Batch()
        for document in documents:
            messages = from_document(document)
            example = reading.template.example(messages, learn_all)
            ids, mask = example.token_ids, example.trained
            if not mask[0] or learn_all:
                start, ids, mask = ids[0], ids[1:], mask[1:]
            else:
                start = first
            raw = document.encode()
            learnt = [message["content"] for message in messages] if learn_all else example.answers
            batch.ids.extend(ids)
            batch.mask += mask
            batch.lengths.append(len(ids))
            batch.starts.append(start)
            batch.digests.append(digest(split_key(document)))
            batch.num_bytes.append(len(raw))
            batch.target_bytes.append(sum(len(text.encode()) for text in learnt))
            batch.without_end += not example.ends
        yield batch


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
        flush(folder)
