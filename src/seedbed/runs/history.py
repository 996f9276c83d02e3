"""What a model has learnt, domain by domain: the history that a model folder carries. Needs no torch.

CHECKPOINT/seedbed/
    history.json                     one stage a domain, the base first
    domains/DOMAIN/held_out.jsonl    text to measure on, one document a line, each a JSON string
    domains/DOMAIN/reserve.jsonl     training text for replay in later domains, likewise
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from seedbed.config.resolve import DOMAIN_NAME
from seedbed.disk import replacing, write_atomically
from seedbed.errors import CheckpointError
from seedbed.parsing import parse_json

BASE = "base"
"""Name of the stage before any domain: what the model knew."""
FILE = "history.json"
"""Below CHECKPOINT/seedbed/, and while a run lasts in RUN/history/."""
VERSION = 1

_AS_WRITTEN = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Domain = Annotated[str, Field(pattern=f"^{DOMAIN_NAME.pattern}$")]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Figure:
    """How well a model predicts the held-out text of one domain."""

    __pydantic_config__: ClassVar[ConfigDict] = _AS_WRITTEN

    loss: Amount
    """Nats per token."""
    bits_per_byte: Amount


@dataclass(frozen=True)
class Stage:
    """One domain, and what learning it did to those before it."""

    __pydantic_config__: ClassVar[ConfigDict] = _AS_WRITTEN

    domain: Domain
    model: str
    """The model folder of this stage, absolute; empty while it is being learnt."""
    fingerprint: str
    """SHA-256 of its weights; empty while it is being learnt or when unknown."""
    run: str | None = None
    """The run folder."""
    data: str | None = None
    """What was learnt."""
    format: str = "text"
    """Of the stored documents."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """How what was known was kept, `{"replay": 0.05, "learning_rate": 2e-5}`; nothing is naive."""
    why: str = ""
    """Why this method, when `--method auto` chose."""
    max_seq_len: Count = 0
    held_out_documents: Count = 0
    held_out_bytes: Count = 0
    reserve_documents: Count = 0
    reserve_bytes: Count = 0
    steps: Count = 0
    tokens: Count = 0
    hours: Amount = 0.0
    peak_memory_mb: Amount = 0.0
    before: Mapping[Domain, Figure] = field(default_factory=dict)
    """Figures at the stage's beginning, by domain, the new one among them."""
    after: Mapping[Domain, Figure] = field(default_factory=dict)
    """Figures at its end; empty while it is being learnt."""


@dataclass(frozen=True)
class History:
    """All stages of a model, the base first."""

    __pydantic_config__: ClassVar[ConfigDict] = _AS_WRITTEN

    stages: tuple[Stage, ...]

    def stage(self, domain: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.domain == domain), None)

    @property
    def domains(self) -> list[str]:
        """Names in the order they were learnt, the base included."""
        return [stage.domain for stage in self.stages]

    def with_stage(self, stage: Stage) -> History:
        """With `stage` at the end, or in the place of the one of that name."""
        if self.stage(stage.domain) is None:
            return replace(self, stages=(*self.stages, stage))
        return replace(self, stages=tuple(stage if old.domain == stage.domain else old for old in self.stages))

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_json(cls, values: Any) -> History:
        """The history that `to_json` gave.

        Raises:
            CheckpointError: not of that form, or of a newer one; the problems are named, not the file.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise CheckpointError(f"version {version}, and this seedbed reads version {VERSION}; install a newer one")
        if version != VERSION:
            raise CheckpointError(f"expected a JSON object with `version` {VERSION} and `stages`")
        content = {name: value for name, value in values.items() if name != "version"}
        try:
            # Through JSON, because in strict mode only JSON's arrays and objects become tuples and dataclasses.
            history = TypeAdapter(cls).validate_json(json.dumps(content, allow_nan=False))
        except ValidationError as error:
            raise CheckpointError("; ".join(_problems(error))) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(str(error)) from None
        if history.domains[:1] != [BASE] or len(set(history.domains)) < len(history.domains):
            raise CheckpointError(f"expected the stage `{BASE}` first, and each domain once; got {history.domains}")
        return history


def read_history(folder: Path) -> History | None:
    """The history of the model in `folder`; None when it has none.

    Raises:
        CheckpointError: it is damaged, or a newer seedbed wrote it.
    """
    return read_history_file(folder / "seedbed" / FILE)


def find_history(folder: Path) -> History | None:
    """The history meant by a folder: the model's own, or for a run that of its best or final model, or the one under
    way; None when there is none.

    Raises:
        CheckpointError: it is damaged, or a newer seedbed wrote it.
    """
    checkpoints = folder / "checkpoints"
    for model in (folder, checkpoints / "best", checkpoints / "final"):
        if history := read_history(model):
            return history
    return read_history_file(folder / "history" / FILE)


def read_history_file(path: Path) -> History | None:
    """The history in the file at `path`; None when there is no such file.

    Raises:
        CheckpointError: it is damaged, or a newer seedbed wrote it.
    """
    try:
        return History.from_json(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable history ({error}); copy the folder again, or use another checkpoint"
        ) from None


def write_history(path: Path, history: History) -> None:
    """Replace the file at `path`; a reader sees the old history or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(history.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_documents(path: Path) -> Iterator[str]:
    """The stored documents, one at a time.

    Raises:
        CheckpointError: the file is missing, or a line is not a JSON string.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                yield _document(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the stored text cannot be read ({error}); copy the folder again") from None


def write_documents(path: Path, documents: Iterable[str]) -> int:
    """Replace the file at `path` by one with these documents; returns the bytes of their text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for document in documents:
            num_bytes += len(document.encode())
            stream.write(json.dumps(document, ensure_ascii=False) + "\n")
    return num_bytes


def _document(line: str, where: str) -> str:
    try:
        document = parse_json(line)
        if isinstance(document, str):
            document.encode()  # fails on half a surrogate pair
            return document
    except ValueError:
        pass
    raise CheckpointError(f"{where}: expected a document as a JSON string; the file is damaged, copy the folder again")


def _problems(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
