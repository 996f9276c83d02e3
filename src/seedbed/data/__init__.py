"""From text on disk to rows of tokens. Nothing imported here needs torch; `seedbed.data.batches` does."""

from __future__ import annotations

from seedbed.data.rows import PackedRows, Row, WholeRows
from seedbed.data.sources import Source, from_texts, open_source, open_whole
from seedbed.data.split import held_out
from seedbed.data.store import Reading, Store, open_store

__all__ = [
    "PackedRows",
    "Reading",
    "Row",
    "Source",
    "Store",
    "WholeRows",
    "from_texts",
    "held_out",
    "open_source",
    "open_store",
    "open_whole",
]
