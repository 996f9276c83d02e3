"""Rows that bring earlier text back beside new text, so that a model keeps what it knew of it.

Replaying a small share of the earlier text, 5 % and even 1 %, holds most of what a model would otherwise
forget when it goes on to other text (Ibrahim et al., 2024). The replayed tokens of an epoch are counted
against its new ones, whatever the size of the stored text: an endless stream of passes over it, of which
every epoch takes the next part. As in `rows.py`, a row is a pure function of (seed, epoch, index).

    T  max_seq_len: tokens in a row
    R  num_targets: replayed targets in an epoch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from seedbed.data.rows import Ints, Row, Rows, WholeRows, check_index, cut_row, permutation
from seedbed.data.store import Store
from seedbed.errors import DataError

PASS_ORDER, MIXED_ORDER = 2, 3  # streams of `permutation`


def replay_targets(new_targets: int, share: float, parts: int) -> list[int]:
    """How many targets each of `parts` earlier texts gives to an epoch of `new_targets` new ones.

    share: of all targets of the epoch, the part that is replayed, at least 0 and less than 1.

    Each gives as many as the others; the first ones give one more where that does not come out even.

    >>> replay_targets(950, 0.05, 3)
    [17, 17, 16]
    """
    assert new_targets >= 0
    assert 0 <= share < 1
    assert parts > 0
    each, over = divmod(round(share * new_targets / (1 - share)), parts)
    return [each + (part < over) for part in range(parts)]


def replay_rows(
    store: Store, documents: Ints, max_seq_len: int, seed: int, num_targets: int, *, packing: bool = True
) -> Rows:
    """Rows that replay `num_targets` targets of the documents in every epoch.

    Exactly so many of a text; of conversations, and of texts without packing, as near as whole rows come.

    Raises:
        DataError: there are no documents, or none has a target of the loss.
    """
    if len(documents) == 0:
        raise DataError("there is no earlier text to replay: its store has no documents; give text, or replay none")
    if packing and store.mask is None:
        return ReplayRows(store, documents, max_seq_len, seed, num_targets)
    return WholeReplayRows(WholeRows(store, documents, max_seq_len, seed, pack=packing), seed, num_targets)


@final
class ReplayRows:
    """Texts as `PackedRows` has them, but exactly R targets an epoch: rows of T targets, and the rest in the last.

    The stream is pass after pass over the documents, each in an order of its own. Epoch e takes its targets
    from e·R on, so all of the text is used once before any of it is used twice. Where an epoch ends inside a
    document, the next one goes on. The rows of an epoch are in the order of the stream; `MixedRows` shuffles.
    """

    def __init__(self, store: Store, documents: Ints, max_seq_len: int, seed: int, num_targets: int) -> None:
        assert max_seq_len > 0
        assert num_targets > 0
        assert len(documents) > 0
        assert store.mask is None, "an answer is never cut from its question"
        self._store = store
        self._documents = np.asarray(documents, dtype=np.int64)
        self._lengths = store.lengths[self._documents]
        self._seed = seed
        self.max_seq_len = max_seq_len
        self.num_targets = num_targets
        self._order: tuple[int, Ints, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""
        return -(-self.num_targets // self.max_seq_len)

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        check_index(index, len(self))
        documents, starts = self._epoch(epoch)
        first = epoch * self.num_targets + index * self.max_seq_len
        end = min(first + self.max_seq_len, (epoch + 1) * self.num_targets)
        return cut_row(self._store, documents, starts, first, end, self.max_seq_len)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Documents of the passes that the epoch touches, where each starts in the endless stream (and the end)."""
        order = self._order
        if order is None or order[0] != epoch:
            size = int(self._lengths.sum())
            first = epoch * self.num_targets
            passes = _passes(first, first + self.num_targets, size)
            places = _orders(self._seed, passes, len(self._documents))
            starts = passes.start * size + np.concatenate([[0], np.cumsum(self._lengths[places])])
            self._order = order = (epoch, self._documents[places], starts)
        return order[1:]


@final
class WholeReplayRows:
    """Rows of whole documents, as many an epoch as come nearest to the targets that were asked for.

    The stream is pass after pass over `rows`, each in an order of its own. Every epoch takes the next K rows:
    as many as hold the targets asked for on average, at least one. So `num_targets`, K times the mean of
    a row, is exact to a row only, and an epoch of unusual rows has more or fewer.
    """

    def __init__(self, rows: WholeRows, seed: int, num_targets: int) -> None:
        assert num_targets > 0
        mean = rows.num_targets / len(rows)
        self._rows = rows
        self._seed = seed
        self._num_rows = max(1, round(num_targets / mean))
        self.max_seq_len = rows.max_seq_len
        self.num_targets = round(self._num_rows * mean)
        self._order: tuple[int, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""
        return self._num_rows

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        check_index(index, len(self))
        return self._rows.row(0, int(self._epoch(epoch)[index]))

    def _epoch(self, epoch: int) -> Ints:
        """Which of the rows each row of the epoch is, (K,)."""
        order = self._order
        if order is None or order[0] != epoch:
            size = len(self._rows)
            first = epoch * self._num_rows
            passes = _passes(first, first + self._num_rows, size)
            skipped = first - passes.start * size
            rows = _orders(self._seed, passes, size)[skipped : skipped + self._num_rows]
            self._order = order = (epoch, rows)
        return order[1]


@final
class MixedRows:
    """The rows of several texts in one order, another in each epoch. `parts[0]` is the new text."""

    def __init__(self, parts: Sequence[Rows], seed: int) -> None:
        assert len({part.max_seq_len for part in parts}) == 1, "rows of one length"
        self.parts = tuple(parts)
        self.max_seq_len = parts[0].max_seq_len
        self.num_targets = sum(part.num_targets for part in parts)
        self._seed = seed
        self._starts = np.cumsum([0, *(len(part) for part in parts)])  # (parts + 1,) in the unshuffled epoch
        self._order: tuple[int, Ints] | None = None

    def __len__(self) -> int:
        """Rows in an epoch; the same in all."""
        return int(self._starts[-1])

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch. Raises IndexError outside 0 … len - 1."""
        part, place = self.locate(epoch, index)
        return self.parts[part].row(epoch, place)

    def locate(self, epoch: int, index: int) -> tuple[int, int]:
        """The part, and the row in it, that row `index` of an epoch is. Raises IndexError outside 0 … len - 1."""
        check_index(index, len(self))
        order = self._order
        if order is None or order[0] != epoch:
            self._order = order = (epoch, permutation(self._seed, epoch, MIXED_ORDER, len(self)))
        place = int(order[1][index])
        part = int(self._starts.searchsorted(place, side="right")) - 1
        return part, place - int(self._starts[part])


def _passes(first: int, end: int, size: int) -> range:
    """The passes, of `size` places each, that the places `first` … `end - 1` of the endless stream are in."""
    return range(first // size, -(-end // size))


def _orders(seed: int, passes: range, count: int) -> Ints:
    """The places of `count` things in one pass after the other, (passes · count,)."""
    return np.concatenate([permutation(seed, number, PASS_ORDER, count) for number in passes])
