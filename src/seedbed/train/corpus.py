"""From the data options to rows of tokens: which documents are held out, and how the rest is read."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seedbed import distributed
from seedbed.config import NO_DATA, TRAINED_HERE, DataOptions, TextOptions, TrainingOptions, read_section
from seedbed.data import PackedRows, Reading, Source, Store, WholeRows, from_texts, held_out, open_source, open_store
from seedbed.data.augment import augmented
from seedbed.data.conversations import from_document, split_key
from seedbed.data.overlap import LIMIT, find_overlap
from seedbed.data.overlap import NAME as OVERLAP
from seedbed.data.rows import Rows
from seedbed.data.store import cache_folder, digest
from seedbed.data.streaming import NoRows, ShardRows, StreamedRows, bring, find_shards, open_shard
from seedbed.errors import ConfigError, DataError, TooLittleTextError
from seedbed.findings import Finding
from seedbed.text.tokenizer import Tokenizer, train_bpe, train_char
from seedbed.train.job import Validation
from seedbed.train.progress import Display

LARGEST_DEFAULT_VOCAB = 8000
MOST_COMPARED = 2**25  # characters, some two seconds
STREAMING = "streaming"  # of the cache, the part for what is streamed
CHANGED = "text_changed"
"""The finding that a run goes on with other text."""


@dataclass(frozen=True)
class Texts:
    """The training text and where the held-out text comes from: a source of its own, or a share of `train`."""

    train: Source
    validation: Source | None
    val_split: float

    @property
    def are_conversations(self) -> bool:
        """Whether documents are conversations, read through a template, and not plain texts."""
        return self.train.format != "text"

    @property
    def hold_out(self) -> bool:
        """Whether anything is kept for validation."""
        return self.validation is not None or self.val_split > 0

    def training_documents(self) -> Iterator[str]:
        """The documents that may be learnt from, by tokenizers too."""
        if self.validation is not None or not self.val_split:
            return self.train.documents()
        return compress(self.train.documents(), ~self._held_out())

    def held_out_documents(self) -> Iterator[str]:
        """The documents kept for validation."""
        if self.validation is not None:
            return self.validation.documents()
        return compress(self.train.documents(), self._held_out()) if self.val_split else iter(())

    def training_texts(self) -> Iterator[str]:
        """What a tokenizer can learn from: the training texts, or what is said in the conversations."""
        if not self.are_conversations:
            return self.training_documents()
        return (message["content"] for text in self.training_documents() for message in from_document(text))

    def fingerprint(self) -> str:
        """SHA-256 of what is trained and validated on, in hexadecimal; of a streamed text, of its first shard."""
        sources = [self.train] if self.validation is None else [self.train, self.validation]
        return hashlib.sha256("\n".join(source.fingerprint() for source in sources).encode()).hexdigest()

    def changed_since(self, before: str) -> list[Finding]:
        """A warning where a run that goes on had another fingerprint; one of an older version had none."""
        now = self.fingerprint()
        if before in ("", now):
            return []
        return [
            Finding(
                CHANGED,
                "warning",
                f"the text of {self.train.name} or of its validation is not the one that this run began with",
                {"sha256": now, "sha256_before": before},
                "Put the old text back, and the run ends as if it had never stopped; as it is, its rows, their order "
                "and its validation losses are others from here on.",
            )
        ]

    def overlap(self) -> list[Finding]:
        """A warning where text that is validated on is also learnt; of long texts the first `MOST_COMPARED`."""
        if self.validation is None or self.are_conversations:  # of conversations, `lint` compares the questions
            return []
        found = find_overlap(_beginning(self.training_documents()), _beginning(self.held_out_documents()))
        if found is None or found.share <= LIMIT:
            return []
        return [
            Finding(
                OVERLAP,
                "warning",
                f"{found.share:.1%} of the validation text {self.validation.name} also stands in the training text "
                f"{self.train.name}, as in {found.excerpt!r}",
                {"share": found.share, "documents": found.documents},
                f"The validation loss will look better than it is: take that text out of one of them, or pass --allow "
                f"{OVERLAP} to keep it.",
            )
        ]

    def augmented(self, seed: int) -> Texts:
        """The training documents and their word-swapped copies; what is held out stays as it is."""
        kind = f"{self.train.fingerprint()} {self.val_split if self.validation is None else 'all'}"
        train = self.train.derived(
            lambda: augmented(self.training_documents(), seed, self.are_conversations), f"swapped {seed} {kind}"
        )
        validation = self.validation
        if validation is None and self.val_split:
            validation = self.train.derived(self.held_out_documents, f"held out {kind}")
        return Texts(train, validation, self.val_split)

    def row_numbers(self) -> tuple[list[int] | None, list[int] | None]:
        """Numbers, from 1, of the training documents and the held-out ones in what was read; None for 1, 2, 3, …"""
        if self.validation is not None or not self.val_split:
            return None, None
        mask = self._held_out()
        return (np.flatnonzero(~mask) + 1).tolist(), (np.flatnonzero(mask) + 1).tolist()

    def _held_out(self) -> NDArray[np.bool_]:
        encoded = ((text, text.encode()) for text in self.train.documents())
        keys = ((split_key(text) if self.are_conversations else raw, len(raw)) for text, raw in encoded)
        facts = np.array([(digest(key), size) for key, size in keys], dtype=np.uint64)  # (documents, 2)
        return held_out(facts[:, 0], facts[:, 1].astype(np.int64), self.val_split)


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and rows to validate on."""

    rows: Rows
    validation: Validation | None
    num_documents: int
    num_bytes: int
    all_tokens: int
    """Of the training documents, those that the loss mask leaves out among them."""
    longest: int
    """Tokens of the longest training document."""
    without_end: int
    """Training documents and held-out ones with an answer whose end is not a target."""


def open_texts(options: TextOptions) -> Texts:
    """Find the sources, preferring the official validation split of a named one.

    Raises:
        ConfigError: no --data was given.
        DataError: missing, empty, or not text.
    """
    if options.data is None:
        raise ConfigError(NO_DATA)

    def source(spec: str, split: str = "train", flag: str = "--data") -> Source:
        return open_source(
            spec,
            text_column=options.text_column,
            document=options.document,
            split=split,
            flag=flag,
            format=options.format,
        )

    train = source(options.data)
    validation = None
    if options.val_data is not None:
        validation = source(options.val_data, flag="--val_data")
    elif options.val_split > 0 and train.has_split("validation"):
        validation = source(options.data, "validation")
    if validation is not None and (validation.format == "text") != (train.format == "text"):
        raise DataError(
            f"--data {options.data} holds {train.format} and --val_data {options.val_data} {validation.format}; "
            "both must be text, or both conversations"
        )
    return Texts(train, validation, options.val_split)


def open_training_texts(options: DataOptions) -> Texts:
    """As `open_texts`; of a text that is streamed the first shard, which stands for all before training begins.

    Raises:
        DataError: also when the text cannot fill one row, whatever the tokenizer.
    """
    texts = open_texts(_of_first_shard(options) if options.streaming else options)
    if options.packing and not texts.are_conversations:
        _require_a_row(texts, options.max_seq_len)
    return texts


def open_run_texts(values: Mapping[str, Any], run: str) -> Texts:
    """The texts of a run with these options, as it divided them.

    Raises:
        ConfigError, DataError: its text is not there any more, or is another kind of text.
    """
    known = {name: values[name] for name in TextOptions.model_fields if name in values}
    options = read_section(TextOptions, known, run)
    return open_texts(_of_first_shard(options) if values.get("streaming") else options)


def _of_first_shard(options: TextOptions) -> TextOptions:
    if options.data is None:
        return options
    with distributed.one_a_node_first():
        first = bring(find_shards(options.data)[0], cache_folder() / STREAMING)
    return options.model_copy(update={"data": str(first)})


def _require_a_row(texts: Texts, max_seq_len: int) -> None:
    if texts.train.num_bytes >= max_seq_len:
        return
    # Parquet may hold more than its size says; and what is wrong inside comes first: it may be why there is so little.
    sizes = [len(text.encode()) for text in texts.train.documents()]
    if sum(sizes) + len(sizes) < max_seq_len:  # each ends with a token of its own
        raise DataError(
            f"--data {texts.train.name}: {sum(sizes):,} bytes of text are less than one row of "
            f"--max_seq_len {max_seq_len:,} tokens; lower --max_seq_len, give more text, or leave rows short with "
            "--no_packing"
        )


def make_tokenizer(options: DataOptions, texts: Texts, display: Display) -> Tokenizer:
    """Load the tokenizer that was named, or train one on the training documents."""
    assert options.tokenizer is not None
    kind = options.tokenizer
    if kind not in TRAINED_HERE:
        return Tokenizer.load(kind)
    if distributed.size() == 1:
        return train_tokenizer(kind, options.vocab_size, texts, display)
    with tempfile.TemporaryDirectory() as folder:

        def train() -> dict[str, str]:
            train_tokenizer(kind, options.vocab_size, texts, display).save(folder)
            return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}

        for name, content in distributed.on_first(train).items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        return Tokenizer.load(folder)


def train_tokenizer(kind: str, vocab_size: int | None, texts: Texts, display: Display) -> Tokenizer:
    """A `bpe` or `char` tokenizer of the training documents alone."""
    with display.working(f"Training a {kind} tokenizer"):
        if kind == "char":
            return train_char(texts.training_texts())
        return train_bpe(texts.training_texts(), vocab_size or default_vocab_size(texts.train.num_bytes))


def default_vocab_size(num_bytes: int) -> int:
    """About one token type for 500 bytes of text, so that each is seen often enough to be learnt."""
    return int(np.clip(num_bytes // 500, 512, LARGEST_DEFAULT_VOCAB))


def tokenize(
    texts: Texts, reading: Reading, options: DataOptions, training: TrainingOptions, display: Display
) -> Corpus:
    """Tokenize both splits into stores (or find them there) and lay rows over them; of a streamed text the first shard.

    Raises:
        DataError: the text is too short for one row, cannot be split, or has nothing to learn.
    """
    seed = training.seed
    if options.augment_word_swap:
        texts = texts.augmented(seed)
    store = _store(texts.train, reading, display)
    everything = np.arange(store.num_documents)
    val_store, val_documents, documents = store, everything[:0], everything
    if texts.validation is not None:
        val_store = _store(texts.validation, reading, display)
        val_documents = np.arange(val_store.num_documents)
    elif texts.val_split > 0:
        mask = held_out(store.digests, store.num_bytes, texts.val_split)
        val_documents, documents = everything[mask], everything[~mask]
    rows: Rows = _rows(store, documents, options, seed, shuffle=True)
    if options.streaming:
        rows = _stream(texts.train, rows, reading, options, training, display)
    validation = None
    if len(val_documents):
        validation = validation_rows(val_store, options, seed, val_documents)
    lengths = store.lengths[documents]
    return Corpus(
        rows=rows,
        validation=validation,
        num_documents=len(documents),
        num_bytes=int(store.num_bytes[documents].sum()),
        all_tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        without_end=store.without_end,
    )


def _beginning(documents: Iterator[str]) -> Iterator[str]:
    left = MOST_COMPARED
    for text in documents:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _stream(
    first: Source,
    first_rows: Rows,
    reading: Reading,
    options: DataOptions,
    training: TrainingOptions,
    display: Display,
) -> StreamedRows:
    """Rows of all shards, as many as the run takes."""
    assert options.data is not None
    names, folder = find_shards(options.data), cache_folder() / STREAMING
    left_out: set[int] = set()

    def open_file(path: str) -> Source:
        return open_source(path, text_column=options.text_column, document=options.document, format=first.format)

    def open_rows(number: int) -> ShardRows:
        if number == 0:
            return ShardRows(first_rows, None)
        try:
            store = open_store(open_shard(names[number], first, folder, open_file), reading, cache=folder)
            rows = _rows(store, np.arange(store.num_documents), options, training.seed, shuffle=True)
        except TooLittleTextError as error:
            if number not in left_out:
                display.line(f"{names[number]} is left out: {error}")
            left_out.add(number)
            return ShardRows(NoRows(), None)
        return ShardRows(rows, store.path)

    facts = (names, first.fingerprint(), *reading.key(), options.max_seq_len, options.packing, len(first_rows))
    layout = hashlib.sha256(repr((*facts, training.seed)).encode()).hexdigest()
    return StreamedRows(len(names), open_rows, training.seed, partial(_rows_wanted, training), layout)


def _rows_wanted(training: TrainingOptions, targets: float) -> int:
    """How many rows a run takes, where a row has so many targets."""
    limits = []
    if training.max_steps is not None:
        limits.append(training.max_steps * training.rows_per_step)
    if training.max_tokens is not None:
        limits.append(math.ceil(training.max_tokens / targets))
    return min(limits)


def validation_rows(
    store: Store, options: DataOptions, seed: int, documents: NDArray[np.int64] | None = None
) -> Validation:
    """Rows of a store's documents, or some of them, to measure on."""
    documents = np.arange(store.num_documents) if documents is None else documents
    rows = _rows(store, documents, options, seed, shuffle=False)
    return Validation(rows, len(documents), rows.target_bytes)


def store_documents(documents: list[str], format: str, reading: Reading, name: str, display: Display) -> Store:
    """The store of documents that are in memory."""
    return _store(replace(from_texts(documents, name), format=format), reading, display)


def _rows(
    store: Store, documents: NDArray[np.int64], options: DataOptions, seed: int, *, shuffle: bool
) -> PackedRows | WholeRows:
    """Texts are packed end to end; conversations, and texts without packing, stay whole."""
    if options.packing and store.mask is None:
        return PackedRows(store, documents, options.max_seq_len, seed, shuffle=shuffle)
    return WholeRows(store, documents, options.max_seq_len, seed, shuffle=shuffle, pack=options.packing)


def _store(source: Source, reading: Reading, display: Display) -> Store:
    with distributed.one_a_node_first(), display.counting(f"Tokenizing {source.name}") as progress:
        return open_store(source, reading, progress=progress)


def keep_tokenizer(tokenizer: Tokenizer, run: Path) -> None:
    """Save a run's tokenizer where its resumes will find it."""
    if (run / "tokenizer").exists():
        return
    temporary = run / ".tokenizer.tmp"
    tokenizer.save(temporary)
    temporary.rename(run / "tokenizer")
