"""From text on disk to rows of tokens. Nothing imported here needs torch; `seedbed.data.batches` does."""

from __future__ import annotations

from seedbed.data.rows import PackedRows, PaddedRows, Row
from seedbed.data.sources import Source, from_texts, open_source, open_whole
from seedbed.data.split import held_out
from seedbed.data.store import Store, open_store

__all__ = [
    "PackedRows",
    "PaddedRows",
    "Row",
    "Source",
    "Store",
    "from_texts",
    "held_out",
    "open_source",
    "open_store",
    "open_whole",
]
