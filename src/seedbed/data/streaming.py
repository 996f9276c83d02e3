"""Text larger than memory and disk: shard after shard is tokenized, learnt and let go.

A shard is a file, here or in an object store (`s3://bucket/part-*.parquet`). Of all tokens, those of three are on disk:
the shard that is learnt, the one before it, and the next, which is made meanwhile.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, final

from seedbed.data.rows import Row, Rows, permutation
from seedbed.data.sources import Source, find_files
from seedbed.errors import ConfigError, DataError, MissingExtra, StorageError

KEPT: Final = 2  # shards whose rows can be asked for without tokenizing them again
ORDER: Final = 4  # of the shards in a pass, among the streams of `permutation`


def is_remote(spec: str) -> bool:
    """Whether it is an address, such as s3://bucket/part-*.parquet, and not a path."""
    return "://" in spec


def find_shards(spec: str) -> list[str]:
    """The files that a path, a folder, a glob or an address means, in an order that is the same everywhere.

    Raises:
        DataError: there are none.
        ConfigError: no such kind of address.
        MissingExtra: an address, and fsspec is not installed.
    """
    if not is_remote(spec):
        return [str(path) for path in find_files(spec, "--data")]
    files, path = _file_system(spec)
    try:
        names = sorted(files.glob(path)) if any(sign in path for sign in "*?[") else sorted(files.find(path))
    except OSError as error:
        raise DataError(f"--data {spec} cannot be listed: {error}") from None
    if not names:
        raise DataError(f"--data {spec}: there is nothing there")
    return [str(files.unstrip_protocol(name)) for name in names]


def bring(name: str, folder: Path) -> Path:
    """A shard as a file on this machine; one from elsewhere is copied into `folder`, unless it is there.

    Raises:
        DataError: it cannot be read.
        StorageError: there is no room for it.
    """
    if not is_remote(name):
        return Path(name)
    files, path = _file_system(name)
    address = hashlib.sha256(name.encode()).hexdigest()[:16]
    local = folder / address / Path(path).name
    if local.exists():
        return local
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=local.parent) as temporary:
            half = Path(temporary) / local.name
            files.get_file(path, str(half))
            half.replace(local)
    except FileNotFoundError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    except OSError as error:
        raise StorageError(f"{name} cannot be brought to {folder}: {error}") from None
    return local


def open_shard(name: str, first: Source, folder: Path, open_file: Callable[[str], Source]) -> Source:
    """The documents of a shard, which hold what those of the first do; one from elsewhere is here while it is read.

    Args:
        name: of the file.
        first: the first shard.
        folder: for what is brought here.
        open_file: opens a file on this machine.

    Raises:
        DataError: it cannot be read.
    """
    if not is_remote(name):
        return open_file(name)
    files, path = _file_system(name)

    def documents() -> Iterator[str]:
        local = bring(name, folder)
        try:
            yield from open_file(str(local)).documents()
        finally:
            shutil.rmtree(local.parent, ignore_errors=True)

    try:
        version = files.ukey(path)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    return first.derived(documents, f"shard {name} {version}")


def _file_system(address: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise MissingExtra("Addresses of object stores", "streaming") from None
    try:
        files, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--data {address}: {error}") from None
    return files, path


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard, and the folder of tokens behind them."""

    rows: Rows
    folder: Path | None
    """None where others may use it too."""


@final
class NoRows:
    """What a shard gives that is too short for a row."""

    max_seq_len = num_targets = target_bytes = 0

    def __len__(self) -> int:
        return 0

    def row(self, epoch: int, index: int) -> Row:
        raise IndexError(f"row {index} of epoch {epoch}")


@final
class StreamedRows:
    """As many rows as a run takes, of one shard after another, in another order in each pass over all.

    In which shard row `index` is follows from how many rows those before it have. That is found out on the way, and
    `found` remembers it, so that a run that goes on needs to open no shard but its own.
    """

    def __init__(
        self,
        num_shards: int,
        open_shard: Callable[[int], ShardRows],
        seed: int,
        wanted: Callable[[float], int],
        layout: str = "",
    ) -> None:
        """
        Args:
            num_shards: at least one.
            open_shard: tokenizes a shard, or finds it tokenized, and gives its rows; the same at every call.
            seed: decides the order of the shards.
            wanted: how many rows the run takes, when a row has so many targets.
            layout: fingerprint of what the numbers of the shards' rows depend on.
        """
        self.num_shards, self._open_shard, self._seed, self.layout = num_shards, open_shard, seed, layout
        self._near: dict[int, ShardRows] = {}  # by place: the first shard of the first pass has place 0
        self._making: threading.Thread | None = None
        self.found: list[int] = []
        """Rows of the shards at the first places."""
        first = self._at(0).rows
        targets = first.num_targets / len(first)
        self.max_seq_len = first.max_seq_len
        self._length = wanted(targets)
        self.num_targets = round(self._length * targets)

    def __len__(self) -> int:
        return self._length

    @property
    def num_ready(self) -> int:
        """Rows at the beginning for which no other shard is opened."""
        return min(self._length, len(self._at(0).rows))

    def has(self, end: int) -> bool:
        """Whether the rows up to `end` are known, and near."""
        ends = list(accumulate(self.found))
        return bool(ends) and end <= ends[-1] and bisect.bisect_left(ends, end) in self._near

    def reach(self, end: int) -> None:
        """Make the rows up to `end` known and near.

        Raises:
            DataError, StorageError: a shard cannot be read, or its tokens not be written.
        """
        while sum(self.found) < end:
            self._at(len(self.found))
        self._at(bisect.bisect_left(list(accumulate(self.found)), end))

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of the run; there is one epoch. Raises IndexError outside 0 … len - 1."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = epoch * self._length + index
        self.reach(number + 1)
        ends = list(accumulate(self.found))
        place = bisect.bisect_right(ends, number)
        shard = self._at(place).rows
        return shard.row(place // self.num_shards, number - (ends[place - 1] if place else 0))

    def _at(self, place: int) -> ShardRows:
        """The shard at a place, opened if it must be; the one after it is begun."""
        if place not in self._near:
            self._wait()
            self._near[place] = self._open_shard(self._shard_at(place))
            if place == len(self.found):
                self.found.append(len(self._near[place].rows))
            self._let_go(place)
            if self.num_shards > 1:
                following = self._shard_at(place + 1)
                self._making = threading.Thread(target=self._make, args=(following,), daemon=True)
                self._making.start()
        return self._near[place]

    def _shard_at(self, place: int) -> int:
        if place == 0:
            return 0  # the one that was looked at before the run began
        one_pass, within = divmod(place, self.num_shards)
        order = permutation(self._seed, one_pass, ORDER, self.num_shards)
        if one_pass == 0:
            order = [0, *(shard for shard in order if shard != 0)]  # type: ignore[assignment]
        return int(order[within])

    def _make(self, shard: int) -> None:
        with contextlib.suppress(DataError, StorageError):  # told when it is its turn
            self._open_shard(shard)

    def _wait(self) -> None:
        if self._making is not None:
            self._making.join()

    def _let_go(self, place: int) -> None:
        """Forget the shard that is furthest away, and remove its tokens."""
        while len(self._near) > KEPT:
            furthest = max(self._near, key=lambda other: abs(other - place))
            folder = self._near.pop(furthest).folder
            if folder is not None and all(folder != near.folder for near in self._near.values()):
                shutil.rmtree(folder, ignore_errors=True)
