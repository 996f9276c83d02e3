"""Texts known by name: Python's own documentation, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

from seedbed.data.documents import split_documents
from seedbed.errors import DataError, MissingExtra


@final
@dataclass(frozen=True)
class HubRows:
    """Where a data set is on the hub, and how its rows make documents."""

    repo: str
    config: str | None = None
    column: str = "text"
    rows_are_lines: bool = False  # WikiText: a row is a line, and articles begin at ` = Title = `


@final
@dataclass(frozen=True)
class NamedSource:
    """A text known by name; `rows` is None for the one that is built in."""

    about: str
    size: str
    splits: dict[str, str]  # our name of a split to theirs
    rows: HubRows | None = None


_ALL_THREE = {"train": "train", "validation": "validation", "test": "test"}

NAMED: dict[str, NamedSource] = {
    "python-docs": NamedSource(
        "the documentation inside your own Python: language topics and docstrings", "2 MB", {"train": "train"}
    ),
    "wikitext-2": NamedSource(
        "Wikipedia's good and featured articles (Merity et al., 2016)",
        "13 MB",
        _ALL_THREE,
        HubRows("Salesforce/wikitext", "wikitext-2-raw-v1", rows_are_lines=True),
    ),
    "wikitext-103": NamedSource(
        "fifty times as many articles of the same kind (Merity et al., 2016)",
        "550 MB",
        _ALL_THREE,
        HubRows("Salesforce/wikitext", "wikitext-103-raw-v1", rows_are_lines=True),
    ),
    "tinystories": NamedSource(
        "short stories in the words of a small child (Eldan and Li, 2023)",
        "2 GB",
        {"train": "train", "validation": "validation"},
        HubRows("roneneldan/TinyStories"),
    ),
    "alpaca": NamedSource(
        "52,000 instructions with their answers, each written out as one text (Taori et al., 2023)",
        "45 MB",
        {"train": "train"},
        HubRows("tatsu-lab/alpaca"),
    ),
    "fineweb-edu": NamedSource(
        "educational web pages, the sample of ten billion tokens (Penedo et al., 2024)",
        "45 GB",
        {"train": "train"},
        HubRows("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    ),
}


def load_hub_documents(name: str, rows: HubRows, split: str) -> Callable[[], Iterator[str]]:
    """Download a split, or find it in the cache of `datasets`; the result reads its documents.

    Raises MissingExtra without the library, DataError when the data set can be neither found nor fetched.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra(f"Named sources such as {name}", "hub") from None
    try:
        table = datasets.load_dataset(rows.repo, rows.config, split=split)
    except Exception as error:  # noqa: BLE001  the network layers below raise errors of a dozen libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name} ({rows.repo}, split {split}) is not in the local cache and could not be downloaded: "
            f"{reason}. Check the network, or give --data a file; python-docs needs no download"
        ) from None
    return lambda: hub_documents(table, rows)


def hub_documents(table: Any, rows: HubRows) -> Iterator[str]:
    """The documents of a table of `datasets`: its rows, or articles put together from rows that are lines."""
    texts = (text for batch in table.iter(batch_size=1000) for text in batch[rows.column])
    if not rows.rows_are_lines:
        return texts
    return split_documents((text.rstrip("\n") + "\n" for text in texts), "article", 0)
