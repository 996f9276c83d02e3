"""Which documents are held out for validation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seedbed.errors import ConfigError, DataError


def held_out(digests: NDArray[np.uint64], sizes: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Choose whole documents that make up `share` of the bytes. Both inputs and the result are (documents,).

    The choice depends on the content alone: not on the order of the documents, nor on a seed. Copies of a
    document (equal digests) go to the same side. Documents are taken in the order of their digests, passing
    over any that alone is more than the share, until their bytes reach it; at least one is on each side.

    Raises ConfigError for a share outside (0, 1), DataError when there is only one document.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--val_split {share} should be above 0 and below 1, or 0 for no validation split")
    distinct, copy_of = np.unique(digests, return_inverse=True)  # (distinct,), (documents,)
    if len(distinct) < 2:
        raise DataError(
            f"the data is {len(distinct)} distinct document(s), and a document is never divided between "
            "training and validation; give --val_data, or --val_split 0"
        )
    bytes_of = np.bincount(copy_of, weights=sizes).astype(np.int64)
    target = share * bytes_of.sum()
    eligible = np.flatnonzero(bytes_of <= target)
    if len(eligible) == 0:
        eligible = np.array([bytes_of.argmin()])
    reached = np.cumsum(bytes_of[eligible])
    count = min(int(np.searchsorted(reached, target)) + 1, len(eligible), len(distinct) - 1)
    chosen = np.zeros(len(distinct), dtype=np.bool_)
    chosen[eligible[:count]] = True
    return np.asarray(chosen[copy_of])
