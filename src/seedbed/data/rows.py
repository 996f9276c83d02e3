"""Rows of tokens for training and validation: which text is row `index` of epoch `epoch`.

    T  max_seq_len: tokens in a row
    N  target tokens in all: each document's tokens and its end of text

A row is a pure function of (seed, epoch, index). Nothing is kept between calls but the order of one epoch,
so any process can ask for any row, and resuming is asking for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from seedbed.data.store import Store
from seedbed.errors import DataError

Ints = NDArray[np.int64]

NO_TARGET = -100  # the label that cross-entropy ignores, as in PyTorch


@final
@dataclass(frozen=True, slots=True)
class Row:
    """T tokens as the model sees them; every array is (T,) int64."""

    input_ids: Ints
    labels: Ints  # the token that follows each input; NO_TARGET where there is nothing to predict
    position_ids: Ints  # 0, 1, … from the start of each document's part
    segment_ids: Ints  # 0, 1, … : which document of the row a token belongs to


@final
class PackedRows:
    """Documents one after another, cut into rows of T targets: no token is padding but in the last row.

    In an epoch the documents, shuffled, form the stream `eos d1 eos d2 eos …`. Row k takes its targets from
    k·T on; its inputs are one place to the left. The rows are then visited in another shuffled order, so that
    the rows of a batch are not neighbours in one long document.

    Raises DataError when `shuffle` is on (training) and there is less than one full row.
    """

    def __init__(self, store: Store, documents: Ints, max_seq_len: int, seed: int, *, shuffle: bool = True) -> None:
        assert max_seq_len > 0
        self._store = store
        self._documents = np.asarray(documents, dtype=np.int64)
        self._seed = seed
        self._shuffle = shuffle
        self.max_seq_len = max_seq_len
        lengths = np.diff(store.offsets)[self._documents]
        self.num_targets = int(lengths.sum())
        if self.num_targets == 0:
            raise DataError("there are no documents to make rows of; give --data more text")
        if shuffle and self.num_targets < max_seq_len:
            raise DataError(
                f"the training text is {self.num_targets:,} tokens, and one row needs {max_seq_len:,}; "
                f"lower --max_seq_len (it is {max_seq_len}), or give --data more text"
            )
        self._order: tuple[int, Ints, Ints, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""
        return -(-self.num_targets // self.max_seq_len)

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        _check_index(index, len(self))
        documents, starts, rows = self._epoch(epoch)
        first = int(rows[index]) * self.max_seq_len
        end = min(first + self.max_seq_len, self.num_targets)
        low = int(starts.searchsorted(first, side="right")) - 1
        high = int(starts.searchsorted(end, side="left"))
        begins = starts[low:high]  # (documents in the row,) where each begins in the stream
        lengths = np.diff(np.minimum(starts[low : high + 1], end))
        lengths[0] -= first - begins[0]
        segments = np.repeat(np.arange(high - low), lengths)  # (T,)
        targets = np.arange(first, end)  # (T,) places in the stream
        shift = self._store.offsets[documents[low:high]] - begins  # from the stream to tokens.bin
        labels = self._store.stream[targets + shift[segments]].astype(np.int64)
        inputs = np.empty_like(labels)
        inputs[1:] = labels[:-1]  # a document's start marker is the end of text of the one before it
        # The token before the row's first target is in the same document, or else it is a start marker.
        inputs[0] = self._store.eos_id if first == begins[0] else self._store.stream[first - 1 + shift[0]]
        positions = targets - np.maximum(begins, first)[segments]
        return _padded(inputs, labels, positions, segments, self.max_seq_len, self._store.eos_id)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Documents in this epoch's order, where each starts in the stream (and the end), rows in order."""
        order = self._order
        if order is None or order[0] != epoch:
            documents, rows = self._documents, np.arange(len(self))
            if self._shuffle:
                documents = documents[permutation(self._seed, epoch, 0, len(documents))]
                rows = permutation(self._seed, epoch, 1, len(self))
            lengths = np.diff(self._store.offsets)[documents]
            starts = np.concatenate([[0], np.cumsum(lengths)])
            self._order = order = (epoch, documents, starts, rows)
        return order[1:]


@final
class PaddedRows:
    """One document in a row: `eos` and its tokens, with its end of text as the last target.

    A document of more than T targets is cut, a shorter one is padded; `truncated_documents`,
    `truncated_tokens` and `padding` (share of all places that hold nothing) say what that cost.
    """

    def __init__(self, store: Store, documents: Ints, max_seq_len: int, seed: int, *, shuffle: bool = True) -> None:
        assert max_seq_len > 0
        self._store = store
        self._documents = np.asarray(documents, dtype=np.int64)
        self._seed = seed
        self._shuffle = shuffle
        self.max_seq_len = max_seq_len
        if len(self._documents) == 0:
            raise DataError("there are no documents to make rows of; give --data more text")
        lengths = np.diff(store.offsets)[self._documents]
        kept = np.minimum(lengths, max_seq_len)
        self.num_targets = int(kept.sum())
        self.padding = 1 - self.num_targets / (len(lengths) * max_seq_len)
        self.truncated_documents = int((lengths > max_seq_len).sum())
        self.truncated_tokens = int((lengths - kept).sum())
        self._order: tuple[int, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch: the number of documents."""
        return len(self._documents)

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        _check_index(index, len(self))
        document = int(self._epoch(epoch)[index])
        labels = self._store.tokens(document)[: self.max_seq_len].astype(np.int64)
        inputs = np.empty_like(labels)
        inputs[0] = self._store.eos_id
        inputs[1:] = labels[:-1]
        positions = np.arange(len(labels))
        return _padded(inputs, labels, positions, np.zeros_like(labels), self.max_seq_len, self._store.eos_id)

    def _epoch(self, epoch: int) -> Ints:
        order = self._order
        if order is None or order[0] != epoch:
            documents = self._documents
            if self._shuffle:
                documents = documents[permutation(self._seed, epoch, 0, len(documents))]
            self._order = order = (epoch, documents)
        return order[1]


def permutation(seed: int, epoch: int, stream: int, length: int) -> Ints:
    """A random order of `range(length)`, a pure function of its arguments.

    Sorts raw Philox numbers (Salmon et al., 2011), whose values are fixed by their definition; NumPy's own
    `permutation` may change from one version to the next, and then no old run could be resumed exactly.
    """
    key = np.array([seed % 2**64, epoch * 2 + stream], dtype=np.uint64)
    numbers = np.random.Philox(key=key).random_raw(length)
    return np.argsort(numbers, kind="stable")


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"row {index} of {length}")


def _padded(inputs: Ints, labels: Ints, positions: Ints, segments: Ints, length: int, eos_id: int) -> Row:
    """Fill a short row up to `length`. Padding follows the last document, which never looks ahead to it."""
    missing = length - len(labels)
    if missing == 0:
        return Row(inputs, labels, positions, segments)
    return Row(
        np.concatenate([inputs, np.full(missing, eos_id)]),
        np.concatenate([labels, np.full(missing, NO_TARGET)]),
        np.concatenate([positions, positions[-1] + 1 + np.arange(missing)]),
        np.concatenate([segments, np.full(missing, segments[-1])]),
    )
