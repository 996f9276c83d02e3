"""JSON and YAML of files that nobody vouches for: what is wrong with a text is a ValueError, whatever it is."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import yaml

LONGEST_YAML: Final = 2**20  # characters; the parser takes some seconds for so many


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not JSON, or its brackets nest too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets nest too deep") from None


ALIAS: Final = re.compile(r"(?:^|[\s\[{,])\*", re.MULTILINE)
NESTED: Final = re.compile(r"[\[{]|-\s+-|\?\s")
MOST_NESTED: Final = 200
FAST: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(yaml.SafeLoader):
    """YAML of plain values, without aliases: by these, a few lines can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write the value out", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: it is not YAML, has aliases, nests too deep, or is longer than a config can be.
    """
    if len(text) > LONGEST_YAML:
        raise ValueError(f"{len(text):,} characters, expected at most {LONGEST_YAML:,}")
    try:
        # The loader in C is eight times as fast, but cannot be told about aliases, nor be trusted with deep nesting.
        simple = not ALIAS.search(text) and len(NESTED.findall(text)) < MOST_NESTED
        return yaml.load(text, Loader=FAST if simple else PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its brackets nest too deep") from None
