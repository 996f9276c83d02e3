"""Damaged files, made from whole ones: bytes changed at random, and JSON whose values are swapped for odd ones."""

from __future__ import annotations

import copy
import json
import random
from typing import Any, Final

ODD: Final[list[Any]] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "", " ", "a", "\x00", "\ud7ff",
    "é" * 50, "x" * 10_000, "../..", "/etc/passwd", "1", "nan", [], [[]], [1], {}, {"": 0}, {"a": {"a": {}}},
]  # fmt: skip
PIECES: Final = [
    b"{", b"}", b"[", b"]", b'"', b"\\", b"\0", b"\xff", b"\xc3\x28", b"\r\n", b": ", b"- ", b"!!", b"&a", b"*a",
    b"%}", b"{%", b"{{", b"9" * 400, b"1e999", b"NaN", b"[" * 2000, b"\xef\xbb\xbf", b"#", b"---\n",
]  # fmt: skip


def damaged(data: bytes, choose: random.Random) -> bytes:
    """A few changes of bytes."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 8])):
        place, size = choose.randrange(len(changed) + 1), choose.randrange(1, 64)
        kind = choose.randrange(6)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << choose.randrange(8)
        elif kind == 1:
            changed[place:place] = choose.choice(PIECES)
        elif kind == 2:
            del changed[place : place + size]
        elif kind == 3:
            changed[place : place + size] = choose.randbytes(size)
        elif kind == 4:
            start = choose.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + size]
        else:
            del changed[place:]
    return bytes(changed)


def odd_json(data: bytes, choose: random.Random) -> bytes:
    """Valid JSON in which some values are others, some keys are gone and some are new."""
    content = copy.deepcopy(json.loads(data))
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        places = list(_places(content))
        if not places:
            break
        parent, key = choose.choice(places)
        kind = choose.randrange(8)
        if kind == 0 and isinstance(parent, dict):
            parent.pop(key, None)
        elif kind == 1 and isinstance(parent, dict):
            parent[choose.choice(["", "extra", "__class__", str(key) + "x"])] = copy.deepcopy(choose.choice(ODD))
        elif kind == 2:
            other, at = choose.choice(places)
            parent[key] = copy.deepcopy(other[at]) if at in other or isinstance(other, list) else None
        else:
            parent[key] = copy.deepcopy(choose.choice(ODD))
    return json.dumps(content).encode()


def _places(content: Any) -> Any:
    """Every value in a JSON document, as its container and its key; of long lists the first ones."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:20])
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)
