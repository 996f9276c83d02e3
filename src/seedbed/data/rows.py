"""Rows of tokens for training and validation: which text is row `index` of epoch `epoch`.

    T  max_seq_len: tokens in a row
    N  target tokens in all: each document's tokens and its end of text, or those that its loss mask leaves

A row is a pure function of (seed, epoch, index). Nothing is kept between calls but the order of one epoch,
so any process can ask for any row, and resuming is asking for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from seedbed.data.store import Store
from seedbed.errors import TooLittleTextError

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


class Rows(Protocol):
    """What a run is trained and validated on, whatever it is made of."""

    @property
    def max_seq_len(self) -> int: ...

    @property
    def num_targets(self) -> int:
        """Targets of the loss in an epoch."""

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""


@final
class PackedRows:
    """Texts one after another, cut into rows of T targets: no token is padding but in the last row.

    In an epoch the documents, shuffled, form the stream `eos d1 eos d2 eos …`. Row k takes its targets from
    k·T on; its inputs are one place to the left. The rows are then visited in another shuffled order, so that
    the rows of a batch are not neighbours in one long document.

    Raises DataError when `shuffle` is on (training) and there is less than one full row.
    """

    def __init__(self, store: Store, documents: Ints, max_seq_len: int, seed: int, *, shuffle: bool = True) -> None:
        assert max_seq_len > 0
        assert store.mask is None, "an answer is never cut from its question"
        self._store = store
        self._documents = np.asarray(documents, dtype=np.int64)
        self._seed = seed
        self._shuffle = shuffle
        self.max_seq_len = max_seq_len
        lengths = store.lengths[self._documents]
        self.num_targets = int(lengths.sum())
        self.target_bytes = int(store.target_bytes[self._documents].sum())
        if self.num_targets == 0:
            raise TooLittleTextError("there are no documents to make rows of; give --data more text")
        if shuffle and self.num_targets < max_seq_len:
            raise TooLittleTextError(
                f"the training text is {self.num_targets:,} tokens, and one row needs {max_seq_len:,}; "
                f"lower --max_seq_len (it is {max_seq_len}), or give --data more text"
            )
        self._order: tuple[int, Ints, Ints, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""
        return -(-self.num_targets // self.max_seq_len)

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        check_index(index, len(self))
        documents, starts, rows = self._epoch(epoch)
        first = int(rows[index]) * self.max_seq_len
        end = min(first + self.max_seq_len, self.num_targets)
        return cut_row(self._store, documents, starts, first, end, self.max_seq_len)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Documents in this epoch's order, where each starts in the stream (and the end), rows in order."""
        order = self._order
        if order is None or order[0] != epoch:
            documents, rows = self._documents, np.arange(len(self))
            if self._shuffle:
                documents = documents[permutation(self._seed, epoch, 0, len(documents))]
                rows = permutation(self._seed, epoch, 1, len(self))
            lengths = self._store.lengths[documents]
            starts = np.concatenate([[0], np.cumsum(lengths)])
            self._order = order = (epoch, documents, starts, rows)
        return order[1:]


@final
class WholeRows:
    """Whole documents, one in a row or as many as fit, padded to T: an answer is never cut from its question.

    With `pack` the documents are put into rows once (best fit, longest first), and an epoch shuffles the rows;
    those of one row do not see each other. A document of more than T targets is cut at T. One that has no
    target of the loss left is passed over.

    Raises DataError when no document has a target.
    """

    def __init__(
        self,
        store: Store,
        documents: Ints,
        max_seq_len: int,
        seed: int,
        *,
        shuffle: bool = True,
        pack: bool = False,
    ) -> None:
        assert max_seq_len > 0
        if len(documents) == 0:
            raise TooLittleTextError("there are no documents to make rows of; give --data more text")
        self._store = store
        self._seed = seed
        self._shuffle = shuffle
        self.max_seq_len = max_seq_len
        documents = np.asarray(documents, dtype=np.int64)
        lengths, targets = store.lengths[documents], _targets_within(store, documents, max_seq_len)  # (documents,) each
        self.longest = int(lengths.max())
        self.truncated_documents = int((lengths > max_seq_len).sum())
        self.truncated_tokens = int((lengths - np.minimum(lengths, max_seq_len)).sum())
        self.num_targets = int(targets.sum())
        self.untrained_documents = int((targets == 0).sum())
        # Of a document that is cut, the bytes that its share of the targets stands for.
        whole = np.maximum(1, _targets_within(store, documents, self.longest))
        self.target_bytes = max(1, round((store.target_bytes[documents] * (targets / whole)).sum()))
        if self.num_targets == 0:
            raise TooLittleTextError(
                f"every label is masked: none of the {len(documents):,} examples has a token to learn within "
                f"--max_seq_len {max_seq_len}; the longest needs {self.longest:,}. Raise it, or see the mask: "
                "`seedbed data show`"
            )
        documents, kept = documents[targets > 0], np.minimum(lengths[targets > 0], max_seq_len)
        if shuffle:
            order = permutation(seed, 0, 0, len(documents))
            documents, kept = documents[order], kept[order]
        bins = best_fit(kept, max_seq_len) if pack else [[place] for place in range(len(documents))]
        self._rows = [documents[places] for places in bins]
        self._lengths = np.array([int(kept[places].sum()) for places in bins])  # (rows,)
        self._order: tuple[int, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""
        return len(self._rows)

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        check_index(index, len(self))
        parts = [self._part(int(document)) for document in self._rows[self._epoch(epoch)[index]]]
        labels, inputs = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
        lengths = [len(part[0]) for part in parts]
        positions = np.concatenate([np.arange(length) for length in lengths])
        segments = np.repeat(np.arange(len(parts)), lengths)
        return _padded(inputs, labels, positions, segments, self.max_seq_len, self._store.eos_id)

    def padding(self, batch_size: int) -> float:
        """Share of the places in an epoch's batches that hold nothing; a batch ends with its longest row."""
        lengths = self._lengths[self._epoch(0)]
        starts = np.arange(0, len(lengths), batch_size)
        rows = np.diff(starts, append=len(lengths))
        return 1 - float(lengths.sum()) / float((np.maximum.reduceat(lengths, starts) * rows).sum())

    def _part(self, document: int) -> tuple[Ints, Ints]:
        """Labels and inputs of one document, at most T of each."""
        targets = self._store.tokens(document)[: self.max_seq_len].astype(np.int64)
        inputs = np.empty_like(targets)
        inputs[0] = self._store.starts[document]
        inputs[1:] = targets[:-1]
        return np.where(self._store.trained(document)[: len(targets)], targets, NO_TARGET), inputs

    def _epoch(self, epoch: int) -> Ints:
        order = self._order
        if order is None or order[0] != epoch:
            rows = permutation(self._seed, epoch, 1, len(self)) if self._shuffle else np.arange(len(self))
            self._order = order = (epoch, rows)
        return order[1]


def cut_row(store: Store, documents: Ints, starts: Ints, first: int, end: int, max_seq_len: int) -> Row:
    """The row whose targets are the places `first` … `end - 1` of a stream of texts, padded to `max_seq_len`.

    documents: (n,), those of the stream, in its order.
    starts: (n + 1,), where each begins in the stream, and where the last one ends.
    """
    low = int(starts.searchsorted(first, side="right")) - 1
    high = int(starts.searchsorted(end, side="left"))
    begins = starts[low:high]  # (documents in the row,) where each begins in the stream
    lengths = np.diff(np.minimum(starts[low : high + 1], end))
    lengths[0] -= first - begins[0]
    segments = np.repeat(np.arange(high - low), lengths)  # (T,)
    targets = np.arange(first, end)  # (T,) places in the stream
    shift = store.offsets[documents[low:high]] - begins  # from the stream to tokens.bin
    labels = store.stream[targets + shift[segments]].astype(np.int64)
    inputs = np.empty_like(labels)
    inputs[1:] = labels[:-1]  # a document's start marker is the end of text of the one before it
    # The token before the row's first target is in the same document, or else it is a start marker.
    inputs[0] = store.eos_id if first == begins[0] else store.stream[first - 1 + shift[0]]
    positions = targets - np.maximum(begins, first)[segments]
    return _padded(inputs, labels, positions, segments, max_seq_len, store.eos_id)


def best_fit(lengths: Ints, capacity: int) -> list[list[int]]:
    """Places of `lengths` (n,) in bins of `capacity`: longest first, each into the fullest bin with room for it.

    >>> best_fit(np.array([5, 3, 6, 2]), 8)
    [[2, 3], [0, 1]]
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left to the bins that have it
    rooms = 0  # bit r is set when some bin has room r
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(place)
        with_room.setdefault(room - length, []).append(number)
        rooms |= 1 << (room - length)
    return bins


def _targets_within(store: Store, documents: Ints, limit: int) -> Ints:
    """How many of each document's first `limit` tokens are targets of the loss, (documents,)."""
    lengths = np.minimum(store.lengths[documents], limit)
    if store.mask is None:
        return lengths
    before = np.concatenate([[0], np.cumsum(store.mask, dtype=np.int64)])  # (tokens + 1,)
    first = store.offsets[documents]
    return np.asarray(before[first + lengths] - before[first])


def permutation(seed: int, epoch: int, stream: int, length: int) -> Ints:
    """A random order of `range(length)`, a pure function of its arguments.

    Sorts raw Philox numbers (Salmon et al., 2011), whose values are fixed by their definition; NumPy's own
    `permutation` may change from one version to the next, and then no old run could be resumed exactly.

    stream: what the order is for. 0: the documents, 1: the rows of one text; `replay.py` has 2 and 3.
    """
    pair, which = divmod(stream, 2)  # two streams share a counter and differ by their keys
    key = np.array([seed % 2**64, epoch * 2 + which], dtype=np.uint64)
    counter = np.array([0, 0, 0, pair], dtype=np.uint64)
    numbers = np.random.Philox(key=key, counter=counter).random_raw(length)
    return np.argsort(numbers, kind="stable")


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless `index` is one of 0 … length - 1."""
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
