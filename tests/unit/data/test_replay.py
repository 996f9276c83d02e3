from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from seedbed.data import PackedRows, Reading, Row, Store, WholeRows, from_texts, open_store
from seedbed.data.conversations import to_document
from seedbed.data.python_docs import python_docs
from seedbed.data.replay import MixedRows, ReplayRows, WholeReplayRows, replay_rows, replay_targets
from seedbed.data.rows import NO_TARGET, Rows, permutation
from seedbed.errors import DataError
from seedbed.text import Tokenizer, train_bpe
from seedbed.text.template import find_template

T = 32
TEXTS = [document[: 40 + 37 * i % 400] for i, document in enumerate(islice(python_docs(), 30))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 400)


@pytest.fixture(scope="module")
def store(tokenizer: Tokenizer, cache_folder: Path) -> Store:
    return open_store(from_texts(TEXTS[:20]), Reading(tokenizer), cache=cache_folder)


@pytest.fixture(scope="module")
def new_store(tokenizer: Tokenizer, cache_folder: Path) -> Store:
    return open_store(from_texts(TEXTS[20:]), Reading(tokenizer), cache=cache_folder)


@pytest.fixture(scope="module")
def chats(tokenizer: Tokenizer, cache_folder: Path) -> Store:
    """Real sentences as conversations: the beginning of each document is asked, the rest is answered."""

    parts = [("user", slice(0, 20)), ("assistant", slice(20, 120))]
    documents = [to_document([{"role": role, "content": text[part]} for role, part in parts]) for text in TEXTS]
    reading = Reading(tokenizer, find_template(tokenizer, "qa", "qa"))
    return open_store(from_texts(documents), reading, cache=cache_folder)


def everything(store: Store) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(store.num_documents)


def replayed(store: Store, num_targets: int, seed: int = 0, max_seq_len: int = T) -> ReplayRows:
    return ReplayRows(store, everything(store), max_seq_len, seed, num_targets)


def all_rows(rows: Rows, epoch: int) -> list[Row]:
    return [rows.row(epoch, index) for index in range(len(rows))]


def targets(rows: list[Row]) -> list[int]:
    return [int(label) for row in rows for label in row.labels if label != NO_TARGET]


def contents(row: Row) -> list[list[int]]:
    return [array.tolist() for array in (row.input_ids, row.labels, row.position_ids, row.segment_ids)]


# How much


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("new", [1, 999, 12_345, 10**9 + 7])
def test_each_earlier_text_gives_its_part_of_the_share(new: int, share: float, parts: int) -> None:
    given = replay_targets(new, share, parts)
    assert len(given) == parts
    assert max(given) - min(given) <= 1
    assert given == sorted(given, reverse=True)
    total = sum(given)
    exact = share * new / (1 - share)
    assert abs(total - exact) <= 0.5 + 1e-9 * exact
    assert {type(count) for count in given} == {int}


def test_five_per_cent_of_all_tokens_are_replayed() -> None:
    assert replay_targets(950, 0.05, 3) == [17, 17, 16]
    assert replay_targets(1000, 0.0, 2) == [0, 0]
    assert replay_targets(1000, 0.5, 1) == [1000]


# Texts


def slow_stream(store: Store, seed: int, length: int) -> list[tuple[int, int, tuple[int, int], int]]:
    """The first targets of the endless stream by its definition: what is seen before each, the target, the (pass,
    document) it is from and its place there."""
    stream: list[tuple[int, int, tuple[int, int], int]] = []
    number = 0
    while len(stream) < length:
        for document in permutation(seed, number, 2, store.num_documents).tolist():
            tokens = store.tokens(document).tolist()
            seen = [store.eos_id, *tokens[:-1]]
            stream += zip(seen, tokens, [(number, document)] * len(tokens), range(len(tokens)), strict=True)
        number += 1
    return stream[:length]


SIZES = [1, T - 1, T, 3 * T, 501, 2_000, 7_777]


@pytest.mark.parametrize("num_targets", SIZES)
@pytest.mark.parametrize("max_seq_len", [T, 1000])
def test_the_rows_are_what_they_are_defined_to_be(store: Store, num_targets: int, max_seq_len: int) -> None:
    rows = replayed(store, num_targets, seed=5, max_seq_len=max_seq_len)
    stream = slow_stream(store, 5, 4 * num_targets)
    for epoch in range(4):
        for index, row in enumerate(all_rows(rows, epoch)):
            first = epoch * num_targets + index * max_seq_len
            expected = stream[first : min(first + max_seq_len, (epoch + 1) * num_targets)]
            seen, labels, owners, places = (list(column) for column in zip(*expected, strict=True))
            count = len(expected)
            assert row.input_ids[:count].tolist() == seen
            assert row.labels.tolist() == labels + [NO_TARGET] * (max_seq_len - count)
            # A document that the row begins inside of has its positions from the row's first token on.
            begun = places[0]
            counted = [
                place - begun if owner == owners[0] else place for owner, place in zip(owners, places, strict=True)
            ]
            assert row.position_ids[:count].tolist() == counted
            numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
            assert row.segment_ids[:count].tolist() == [numbers[owner] for owner in owners]
            assert {len(values) for values in contents(row)} == {max_seq_len}
            assert {values.dtype for values in (row.input_ids, row.labels, row.segment_ids)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("num_targets", SIZES)
def test_every_epoch_has_exactly_the_targets_asked_for(store: Store, num_targets: int) -> None:
    """Texts smaller and larger than an epoch of replay, rows that come out even and rows that do not."""
    assert SIZES[-1] > 2 * store.num_tokens > 4 * SIZES[3]
    rows = replayed(store, num_targets)
    for epoch in (0, 1, 2, 9):
        counts = [len(targets([row])) for row in all_rows(rows, epoch)]
        assert sum(counts) == rows.num_targets == num_targets
        assert set(counts[:-1]) <= {T}
        assert len(counts) == -(-num_targets // T)


@pytest.mark.parametrize("num_targets", [97, 2_000, 7_777])
def test_all_is_used_once_before_any_is_used_twice(store: Store, num_targets: int) -> None:
    rows = replayed(store, num_targets, seed=1)
    size = store.num_tokens
    epochs = -(-3 * size // num_targets)
    stream = list(chain.from_iterable(targets(all_rows(rows, epoch)) for epoch in range(epochs)))
    passes = [stream[size * number : size * (number + 1)] for number in range(3)]
    for one in passes:
        assert Counter(one) == Counter(store.stream.tolist())
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_token_never_sees_another_document(store: Store) -> None:
    """Every part of a row is found, inputs and targets alike, in one document of the store."""
    documents = [[store.eos_id, *store.tokens(document).tolist()] for document in range(store.num_documents)]
    for row in all_rows(replayed(store, 1_111, seed=2), 3):
        for segment in np.unique(row.segment_ids):
            kept = (row.segment_ids == segment) & (row.labels != NO_TARGET)
            inputs, labels = row.input_ids[kept].tolist(), row.labels[kept].tolist()
            part = [inputs[0], *labels]
            assert inputs == part[:-1]
            assert any(
                part == document[at : at + len(part)] for document in documents for at in range(len(document) - 1)
            )


def test_only_the_chosen_documents_are_replayed(store: Store) -> None:
    chosen = np.array([2, 5, 11])
    rows = ReplayRows(store, chosen, T, 0, int(np.diff(store.offsets)[chosen].sum()))
    expected = Counter(token for document in chosen for token in store.tokens(document).tolist())
    assert Counter(targets(all_rows(rows, 0))) == Counter(targets(all_rows(rows, 1))) == expected


# Conversations


def is_whole(store: Store, inputs: list[int], labels: list[int]) -> bool:
    """Whether a part of a row is one document from its first token to its last, and perhaps padding."""
    for document in range(store.num_documents):
        tokens = store.tokens(document).astype(np.int64)
        learnt = np.where(store.trained(document), tokens, NO_TARGET)
        padding = [NO_TARGET] * (len(labels) - len(tokens))
        if labels == [*learnt.tolist(), *padding] and inputs[: len(tokens)] == [store.starts[document], *tokens[:-1]]:
            return True
    return False


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_targets", [1, 500, 5_000])
def test_conversations_are_never_cut(chats: Store, packing: bool, num_targets: int) -> None:
    length = 256
    rows = replay_rows(chats, everything(chats), length, 3, num_targets, packing=packing)
    for row in all_rows(rows, 0) + all_rows(rows, 1):
        for segment in np.unique(row.segment_ids):
            inside = row.segment_ids == segment
            assert is_whole(chats, row.input_ids[inside].tolist(), row.labels[inside].tolist())
    by_row = WholeRows(chats, everything(chats), length, 3, pack=packing)
    assert by_row.truncated_documents == 0
    mean = by_row.num_targets / len(by_row)
    assert len(rows) == max(1, round(num_targets / mean))
    assert rows.num_targets == round(len(rows) * mean)
    assert abs(rows.num_targets - num_targets) <= mean


@pytest.mark.parametrize("num_targets", [700, 9_000])
def test_all_conversations_are_used_once_before_any_is_used_twice(chats: Store, num_targets: int) -> None:
    rows = replay_rows(chats, everything(chats), 128, 3, num_targets)
    once = WholeRows(chats, everything(chats), 128, 3, pack=True)
    size = len(once)
    expected = Counter(str(contents(row)) for row in all_rows(once, 0))
    drawn = [str(contents(row)) for epoch in range(-(-3 * size // len(rows))) for row in all_rows(rows, epoch)]
    passes = [drawn[size * number : size * (number + 1)] for number in range(3)]
    assert [Counter(one) for one in passes] == [expected] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_which_rows_replay_which_text(store: Store, chats: Store) -> None:
    assert isinstance(replay_rows(store, everything(store), T, 0, 10), ReplayRows)
    assert isinstance(replay_rows(store, everything(store), T, 0, 10, packing=False), WholeReplayRows)
    assert isinstance(replay_rows(chats, everything(chats), T, 0, 10), WholeReplayRows)


def test_nothing_to_replay(store: Store, chats: Store) -> None:
    for one in (store, chats):
        with pytest.raises(DataError, match="there is no earlier text to replay"):
            replay_rows(one, everything(one)[:0], T, 0, 10)
    with pytest.raises(DataError, match="every label is masked"):
        replay_rows(chats, everything(chats), 2, 0, 10)


# Mixed


@pytest.fixture(scope="module")
def mixed(store: Store, new_store: Store, chats: Store) -> Callable[[], MixedRows]:
    def make() -> MixedRows:
        new = PackedRows(new_store, everything(new_store), T, 0)
        earlier = replay_rows(store, everything(store), T, 0, 333)
        return MixedRows([new, earlier, replay_rows(chats, everything(chats), T, 0, 200)], 0)

    return make


def test_every_row_of_every_part_comes_once_an_epoch(mixed: Callable[[], MixedRows]) -> None:
    rows = mixed()
    assert len(rows) == sum(len(part) for part in rows.parts)
    assert rows.num_targets == sum(part.num_targets for part in rows.parts)
    orders = []
    for epoch in (0, 1, 2):
        order = [rows.locate(epoch, index)[0] for index in range(len(rows))]
        for number, part in enumerate(rows.parts):
            found = [rows.row(epoch, index) for index, owner in enumerate(order) if owner == number]
            assert Counter(str(contents(row)) for row in found) == Counter(
                str(contents(row)) for row in all_rows(part, epoch)
            )
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert 1 in orders[0][: len(rows) // 2]
    assert 1 in orders[0][len(rows) // 2 :]


def test_the_share_that_is_replayed_is_exact(store: Store, new_store: Store) -> None:
    new = PackedRows(new_store, everything(new_store), T, 0)
    documents = everything(store)
    counts = replay_targets(new.num_targets, 0.25, 2)
    earlier = [
        replay_rows(store, chosen, T, 0, count)
        for chosen, count in zip((documents[:8], documents[8:]), counts, strict=True)
    ]
    rows = MixedRows([new, *earlier], 0)
    for epoch in (0, 1, 6):
        by_part: Counter[int] = Counter()
        for index in range(len(rows)):
            by_part[rows.locate(epoch, index)[0]] += len(targets([rows.row(epoch, index)]))
        assert dict(by_part) == {0: new.num_targets, 1: counts[0], 2: counts[1]}
        assert by_part.total() == rows.num_targets
        assert abs(sum(counts) - 0.25 * by_part.total()) <= 0.5


def test_rows_of_different_lengths_do_not_mix(store: Store) -> None:
    with pytest.raises(AssertionError):
        MixedRows([replayed(store, 100), replayed(store, 100, max_seq_len=T + 1)], 0)


# All of them


@pytest.mark.parametrize("kind", ["text", "chats", "mixed"])
def test_a_row_depends_on_seed_epoch_and_index_alone(
    kind: str, store: Store, chats: Store, mixed: Callable[[], MixedRows]
) -> None:
    def make(seed: int = 0) -> Rows:
        if kind == "mixed":
            return MixedRows(mixed().parts, seed)
        used = store if kind == "text" else chats
        return replay_rows(used, everything(used), T, seed, 400)

    rows = make()
    order = [(epoch, index) for epoch in (1, 0, 7) for index in (4, 0, 9)] * 2
    assert len(rows) > 9
    for epoch, index in order:
        assert contents(rows.row(epoch, index)) == contents(make().row(epoch, index))
    in_turn = [[contents(row) for row in all_rows(make(seed), epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert in_turn[0] != in_turn[1]
    assert in_turn[0] != in_turn[2]
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.row(0, index)


def test_the_orders_are_fixed_for_all_time_and_do_not_meet() -> None:
    assert permutation(0, 0, 2, 8).tolist() == [7, 4, 2, 6, 5, 0, 1, 3]
    assert permutation(1234, 7, 3, 8).tolist() == [5, 7, 0, 4, 6, 2, 3, 1]
    orders = {tuple(permutation(7, epoch, stream, 50).tolist()) for epoch in range(20) for stream in range(4)}
    assert len(orders) == 20 * 4
