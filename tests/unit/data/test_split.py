from __future__ import annotations

import numpy as np
import pytest

from seedbed.data import held_out
from seedbed.errors import ConfigError, DataError


def documents(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**63, count).astype(np.uint64), rng.integers(10, 1000, count)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_bytes_is_reached_with_whole_documents(share: float) -> None:
    digests, sizes = documents(2000)
    chosen = held_out(digests, sizes, share)
    got = sizes[chosen].sum() / sizes.sum()
    assert share <= got < share + 1000 / sizes.sum()


def test_copies_are_on_one_side() -> None:
    digests, sizes = documents(500)
    digests, sizes = np.concatenate([digests, digests[:300]]), np.concatenate([sizes, sizes[:300]])
    chosen = held_out(digests, sizes, 0.2)
    assert not set(digests[chosen]) & set(digests[~chosen])


def test_the_order_of_documents_does_not_matter() -> None:
    digests, sizes = documents(300)
    order = np.random.default_rng(1).permutation(300)
    chosen = held_out(digests, sizes, 0.1)
    again = held_out(digests[order], sizes[order], 0.1)
    assert set(digests[chosen]) == set(digests[order][again])


def test_at_least_one_on_each_side() -> None:
    digests = np.array([1, 2], dtype=np.uint64)
    for sizes in ([10, 1000], [1000, 10], [10, 10]):
        for share in (0.001, 0.5, 0.999):
            assert held_out(digests, np.array(sizes), share).sum() == 1


def test_a_document_larger_than_the_share_stays_in_training() -> None:
    digests = np.arange(11, dtype=np.uint64)
    sizes = np.array([1000] + [10] * 10)
    chosen = held_out(digests, sizes, 0.05)
    assert not chosen[0]
    assert chosen.any()


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match="--val_data, or --val_split 0"):
        held_out(np.array([5, 5], dtype=np.uint64), np.array([10, 10]), 0.1)
    with pytest.raises(ConfigError, match="--val_split 1"):
        held_out(np.array([5, 6], dtype=np.uint64), np.array([10, 10]), 1)
