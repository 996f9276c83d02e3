"""Records that outlive a killed process: what was written or paid for once is read, not made again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seedbed import distributed
from seedbed.errors import StorageError
from seedbed.runs.folder import read_records


class Transcript:
    """The records of a `.jsonl` file by their `key`, in the order in which they were made.

    Of several processes all know them, and the first one reads and writes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, list[dict[str, Any]]] = {}
        for record in distributed.on_first(lambda: list(read_records(path))):
            self._remember(record)

    def find(self, key: str) -> Sequence[Mapping[str, Any]]:
        """All records of a key, the oldest first."""
        return self._records.get(key, ())

    def add(self, record: Mapping[str, Any]) -> None:
        """Remember a record and write it at once, as a whole line, whatever else the file ends with.

        Raises:
            StorageError: the disk is full or refuses.
        """
        self._remember(record)
        if not distributed.is_first():
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as stream:
                stream.write(line if _ends_whole(self.path) else b"\n" + line)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written ({error.strerror}); what it holds is kept") from None

    def _remember(self, record: Mapping[str, Any]) -> None:
        self._records.setdefault(str(record.get("key")), []).append(dict(record))


def _ends_whole(path: Path) -> bool:
    """Whether a file is empty or ends with a whole line; one that was killed leaves half of it."""
    with path.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
