"""JSON and YAML of files that nobody vouches for: what is wrong with a text is a ValueError, whatever it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from seedbed.errors import CheckpointError

MODEL_SUFFIXES: Final = (".json", ".jinja", ".txt", ".model", ".safetensors")
LONGEST_YAML: Final = 2**20  # characters; the parser takes some seconds for so many


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """What a JSON text says; of a key that stands twice the second value, or with `unique` an error.

    Raises:
        ValueError: it is not JSON, or its brackets nest too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_doubles if unique else None)
    except RecursionError:
        raise ValueError("its brackets nest too deep") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


ALIAS: Final = re.compile(r"(?:^|[\s\[{,])\*", re.MULTILINE)
NESTED: Final = re.compile(r"[\[{]|-\s+-|\?\s")
MOST_NESTED: Final = 200
EXPONENT: Final = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # 5e-5, which YAML 1.1 takes for a word


class FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML of plain values, by the parser in C."""


class PlainLoader(yaml.SafeLoader):
    """YAML of plain values, without aliases: by these, a few lines can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write the value out", mark)
        return super().compose_node(parent, index)


for loader in (FastLoader, PlainLoader):
    loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: it is not YAML, has aliases or a key twice, nests too deep, or is longer than a config can be.
    """
    if len(text) > LONGEST_YAML:
        raise ValueError(f"{len(text):,} characters, expected at most {LONGEST_YAML:,}")
    # The parser in C is eight times as fast, but cannot be told about aliases, nor be trusted with deep nesting.
    simple = not ALIAS.search(text) and len(NESTED.findall(text)) < MOST_NESTED
    try:
        loader = FastLoader(text) if simple else PlainLoader(text)
        node = loader.get_single_node()
        if problems := list(_keys_twice(node)):
            raise ValueError("; ".join(problems))
        return loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its brackets nest too deep") from None


def _keys_twice(node: yaml.Node | None) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    yield f"line {line}: {key.value} stands on line {lines[key.value]} too; leave one out"
                lines[key.value] = line
            yield from _keys_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys_twice(value)


def require_plain_files(folder: Path) -> None:
    """Look at what a model folder holds before any of it is read.

    Links have to stay inside; those of the hub's cache lead to its blobs.

    Raises:
        CheckpointError: a link that leaves the folder, or a pipe or device in place of a file.
    """
    home = folder.resolve()
    inside = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in folder.glob("*"):
        if path.suffix not in MODEL_SUFFIXES:
            continue
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise CheckpointError(f"{path} is a link out of its folder, to {target}; put a copy of that file there")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file; put the model's own there, or remove it")
