from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from seedbed.data import PackedRows, Reading, Row, Store, WholeRows, from_texts, open_store
from seedbed.data.rows import NO_TARGET, best_fit, permutation
from seedbed.errors import DataError
from seedbed.text import Tokenizer, train_char

LENGTHS = [5, 1, 30, 12, 3, 17, 8, 2, 2, 21]
T = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abc"])


@pytest.fixture
def store(tokenizer: Tokenizer, tmp_path: Path) -> Store:
    """Documents of one repeated letter each, so that a row shows which document a token is from."""
    texts = [chr(ord("a") + i) * length for i, length in enumerate(LENGTHS)]
    return open_store(from_texts(texts), Reading(tokenizer), cache=tmp_path)


def all_rows(rows: PackedRows | WholeRows, epoch: int) -> list[Row]:
    return [rows.row(epoch, index) for index in range(len(rows))]


def slow_packed(
    store: Store, documents: list[int], length: int
) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """The rows by the definition, token by token: inputs, labels, positions and segments."""
    stream = [(store.eos_id, document) for document in documents[:1]]
    for document, after in zip(documents, [*documents[1:], -1], strict=True):
        stream += [(int(token), document) for token in store.tokens(document)[:-1]]
        stream.append((store.eos_id, after))
    rows = []
    for start in range(0, len(stream) - 1, length):
        inputs = stream[start : start + length]
        labels = [token for token, _ in stream[start + 1 : start + length + 1]]
        inputs = inputs[: len(labels)]
        owners = [document for _, document in inputs]
        segments = [len(set(owners[: i + 1])) - 1 for i in range(len(owners))]
        positions = [i - owners.index(owner) for i, owner in enumerate(owners)]
        rows.append(([token for token, _ in inputs], labels, positions, segments))
    return rows


@pytest.mark.parametrize("length", [1, 3, 8, 50, 200])
def test_packed_rows_are_what_they_are_defined_to_be(store: Store, length: int) -> None:
    documents = [3, 0, 9, 1, 4]
    rows = PackedRows(store, np.array(documents), length, seed=0, shuffle=False)
    expected = slow_packed(store, documents, length)
    assert len(rows) == len(expected)
    for row, (inputs, labels, positions, segments) in zip(all_rows(rows, 0), expected, strict=True):
        count = len(labels)
        assert row.input_ids[:count].tolist() == inputs
        assert row.labels.tolist() == labels + [NO_TARGET] * (length - count)
        assert row.position_ids[:count].tolist() == positions
        assert row.segment_ids[:count].tolist() == segments
        assert {len(values) for values in (row.input_ids, row.position_ids, row.segment_ids)} == {length}
        assert {values.dtype for values in (row.input_ids, row.labels, row.segment_ids)} == {np.dtype(np.int64)}
        assert row.position_ids.max() < length


@pytest.mark.parametrize("kind", [PackedRows, WholeRows])
def test_every_target_comes_once_an_epoch(kind: type[PackedRows | WholeRows], store: Store) -> None:
    documents = np.arange(store.num_documents)
    rows = kind(store, documents, 64, seed=3)
    for epoch in (0, 1, 5):
        seen = Counter(int(label) for row in all_rows(rows, epoch) for label in row.labels if label != NO_TARGET)
        assert seen == Counter(store.stream.tolist())
        assert seen.total() == rows.num_targets == sum(LENGTHS) + len(LENGTHS)


def test_a_token_never_sees_another_document(store: Store) -> None:
    rows = PackedRows(store, np.arange(store.num_documents), T, seed=1)
    for row in all_rows(rows, 2):
        for segment in np.unique(row.segment_ids):
            inside = row.segment_ids == segment
            letters = set(row.input_ids[inside].tolist()) | set(row.labels[inside].tolist())
            assert len(letters - {store.eos_id, NO_TARGET}) <= 1
            positions = row.position_ids[inside]
            assert positions.tolist() == list(range(len(positions)))


def test_only_the_chosen_documents_are_used(store: Store) -> None:
    chosen = np.array([2, 5])
    tokens = set(store.tokens(2).tolist()) | set(store.tokens(5).tolist())
    for kind in (PackedRows, WholeRows):
        for row in all_rows(kind(store, chosen, T, seed=0), 0):
            assert set(row.input_ids.tolist()) <= tokens


@pytest.mark.parametrize("kind", [PackedRows, WholeRows])
def test_a_row_depends_on_seed_epoch_and_index_alone(kind: type[PackedRows | WholeRows], store: Store) -> None:
    documents = np.arange(store.num_documents)

    def inputs(seed: int, epoch: int, indices: list[int]) -> list[list[int]]:
        rows = kind(store, documents, T, seed)
        return [rows.row(epoch, index).input_ids.tolist() for index in indices]

    rows = kind(store, documents, T, 0)
    order = [(epoch, index) for epoch in (1, 0, 2) for index in (4, 0, 9)] * 2
    mixed = [rows.row(epoch, index).input_ids.tolist() for epoch, index in order]
    assert mixed == [inputs(0, epoch, [index])[0] for epoch, index in order]
    everything = list(range(10))
    assert inputs(0, 0, everything) != inputs(0, 1, everything)
    assert inputs(0, 0, everything) != inputs(1, 0, everything)


def test_rows_are_visited_in_another_order_than_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(26 * 40))
    store = open_store(from_texts([text]), Reading(tokenizer), cache=tmp_path)
    rows = PackedRows(store, np.array([0]), 26, seed=0)
    starts = [rows.row(0, index).input_ids.tolist() for index in range(3)]
    plain = PackedRows(store, np.array([0]), 26, seed=0, shuffle=False)
    assert starts != [plain.row(0, index).input_ids.tolist() for index in range(3)]


def test_the_shuffled_order_is_fixed_for_all_time() -> None:
    """A stopped run is resumed under another NumPy: these numbers must never change."""
    assert permutation(0, 0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(1234, 7, 1, 8).tolist() == [7, 4, 6, 0, 1, 2, 3, 5]
    assert sorted(permutation(5, 3, 0, 1000).tolist()) == list(range(1000))
    assert permutation(-1, 0, 0, 3).tolist() == permutation(2**64 - 1, 0, 0, 3).tolist()


def test_too_little_text_for_one_row(store: Store) -> None:
    with pytest.raises(DataError, match=r"8 tokens, and one row needs 9; lower --max_seq_len"):
        PackedRows(store, np.array([0, 1]), 9, seed=0)
    assert len(PackedRows(store, np.array([0, 1]), 8, seed=0)) == 1
    assert len(PackedRows(store, np.array([0, 1]), 9, seed=0, shuffle=False)) == 1
    for kind in (PackedRows, WholeRows):
        with pytest.raises(DataError, match="no documents"):
            kind(store, np.array([], dtype=np.int64), 8, seed=0)


def test_a_row_that_is_not_there(store: Store) -> None:
    for kind in (PackedRows, WholeRows):
        rows = kind(store, np.arange(10), T, seed=0)
        for index in (-1, len(rows)):
            with pytest.raises(IndexError):
                rows.row(0, index)


def test_padded_rows(store: Store) -> None:
    rows = WholeRows(store, np.array([2, 0]), T, seed=0, shuffle=False)
    eos, cut, short = store.eos_id, rows.row(0, 0), rows.row(0, 1)
    c, a = int(store.tokens(2)[0]), int(store.tokens(0)[0])
    assert cut.input_ids.tolist() == [eos] + [c] * 7
    assert cut.labels.tolist() == [c] * 8
    assert short.input_ids.tolist() == [eos] + [a] * 5 + [eos] * 2
    assert short.labels.tolist() == [a] * 5 + [eos] + [NO_TARGET] * 2
    for row in (cut, short):
        assert row.position_ids.tolist() == list(range(T))
        assert not row.segment_ids.any()
    assert (rows.num_targets, rows.truncated_documents, rows.truncated_tokens) == (14, 1, 31 - 8)
    assert rows.padding(2) == pytest.approx(2 / 16)
    assert rows.padding(1) == 0  # a batch ends with its longest row


# Conversations


def masked_store(*masks: str) -> Store:
    """Documents as the loss sees them: "..##" is two tokens that are read and two that are learnt.

    Document d begins with the token 1000 + d, and its tokens are 100 d, 100 d + 1, ...
    """
    lengths = np.array([len(mask) for mask in masks])
    per_document = np.zeros(len(masks), dtype=np.int64)
    return Store(
        path=Path("nowhere"),
        eos_id=0,
        vocab_size=2000,
        stream=np.concatenate([100 * d + np.arange(n) for d, n in enumerate(lengths)]).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        starts=1000 + np.arange(len(masks)),
        digests=per_document.astype(np.uint64),
        num_bytes=per_document,
        target_bytes=per_document,
        mask=np.array([character == "#" for mask in masks for character in mask]),
        without_end=0,
    )


def whole_rows(store: Store, length: int = T, **options: bool) -> WholeRows:
    return WholeRows(store, np.arange(store.num_documents), length, seed=0, **options)


def parts(row: Row) -> list[tuple[list[int], list[int], list[int]]]:
    """Inputs, labels and positions of each segment."""
    arrays = (row.input_ids, row.labels, row.position_ids)
    return [
        tuple(array[row.segment_ids == segment].tolist() for array in arrays)
        for segment in range(row.segment_ids[-1] + 1)
    ]


def test_what_is_masked_is_read_and_not_predicted() -> None:
    rows = whole_rows(masked_store("..##.#", "#", "...."), shuffle=False)
    assert len(rows) == 2
    first, second = rows.row(0, 0), rows.row(0, 1)
    assert first.input_ids.tolist() == [1000, 0, 1, 2, 3, 4, 0, 0]
    assert first.labels.tolist() == [NO_TARGET, NO_TARGET, 2, 3, NO_TARGET, 5, NO_TARGET, NO_TARGET]
    assert second.input_ids.tolist() == [1001] + [0] * 7
    assert second.labels.tolist() == [100] + [NO_TARGET] * 7
    assert first.position_ids.tolist() == list(range(8))
    assert (rows.num_targets, rows.untrained_documents, rows.longest) == (4, 1, 6)


def test_packed_conversations_begin_anew() -> None:
    rows = whole_rows(masked_store(".##", "..##", ".#"), length=10, shuffle=False, pack=True)
    assert len(rows) == 1
    assert parts(rows.row(0, 0)) == [
        ([1001, 100, 101, 102], [NO_TARGET, NO_TARGET, 102, 103], [0, 1, 2, 3]),
        ([1000, 0, 1], [NO_TARGET, 1, 2], [0, 1, 2]),
        ([1002, 200, 0], [NO_TARGET, 201, NO_TARGET], [0, 1, 2]),  # and the padding
    ]
    assert rows.padding(1) == 0  # the place after the last one is cut


@pytest.mark.parametrize("pack", [False, True])
def test_a_long_conversation_loses_its_end(pack: bool) -> None:
    rows = whole_rows(masked_store("...#####", "....#", "##"), length=4, shuffle=False, pack=pack)
    assert (rows.num_targets, rows.truncated_documents, rows.truncated_tokens) == (3, 2, 5)
    assert rows.untrained_documents == 1
    assert rows.longest == 8
    labels = [label for row in all_rows(rows, 0) for label in row.labels.tolist() if label != NO_TARGET]
    assert labels == [3, 200, 201]


def test_nothing_left_to_learn() -> None:
    with pytest.raises(DataError, match=r"every label is masked: none of the 2 .*--max_seq_len 4; the longest needs 7"):
        whole_rows(masked_store("....###", "....#"), length=4)


@pytest.mark.parametrize("pack", [False, True])
def test_each_conversation_comes_once_an_epoch(pack: bool) -> None:
    rng = np.random.default_rng(0)
    masks = ["." * rng.integers(1, 12) + "#" * rng.integers(1, 12) for _ in range(200)]
    store = masked_store(*masks)
    rows = whole_rows(store, length=32, pack=pack)
    orders = []
    for epoch in (0, 3):
        found = [part for row in all_rows(rows, epoch) for part in parts(row)]
        orders.append([inputs[0] for inputs, _, _ in found])
        assert sorted(orders[-1]) == store.starts.tolist()
        for inputs, labels, positions in found:
            document = inputs[0] - 1000
            tokens = store.tokens(document).astype(np.int64)
            expected = np.where(store.trained(document), tokens, NO_TARGET).tolist()
            assert labels[: len(tokens)] == expected
            assert set(labels[len(tokens) :]) <= {NO_TARGET}
            assert inputs[1 : len(tokens)] == tokens[:-1].tolist()
            assert positions == list(range(len(inputs)))
    assert orders[0] != orders[1]
    assert rows.num_targets == sum(mask.count("#") for mask in masks)
    if pack:
        assert rows.padding(8) < 0.02
        assert len(rows) <= 1.03 * store.num_tokens / 32 + 1


def test_packing_is_best_fit() -> None:
    """Against the definition: longest first, each into the fullest bin with room for it."""
    rng = np.random.default_rng(0)
    for capacity in (1, 7, 64):
        lengths = rng.integers(1, capacity + 1, 150)
        loads: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [load for load in loads if load + length <= capacity]
            if fitting:
                loads.remove(max(fitting))
            loads.append(max(fitting, default=0) + length)
        bins = best_fit(lengths, capacity)
        assert sorted(place for places in bins for place in places) == list(range(150))
        assert sorted(int(lengths[places].sum()) for places in bins) == sorted(loads)
        assert max(loads) <= capacity
    assert best_fit(np.array([5, 3, 6, 2]), 8) == [[2, 3], [0, 1]]
    assert best_fit(np.array([], dtype=np.int64), 8) == []
