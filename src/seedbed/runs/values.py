"""Values out of run folders: which are numbers, and how they are written for people."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a number that can be reckoned with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_json(value: object) -> Any:
    """A value from a YAML file as JSON can hold it; what it cannot (dates, infinities) becomes text."""
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value if value is None or isinstance(value, str | bool) or is_number(value) else str(value)


def plain(value: object) -> str:
    """An option's value as one would type it.

    >>> plain(5e-05), plain(True), plain(None), plain(["a", "b"])
    ('5e-05', 'on', 'none', 'a,b')
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(map(plain, value))
    return "none" if value is None else str(value)


def size(count: float) -> str:
    """
    >>> size(134_515_008), size(4_884_480), size(1_638_022_400), size(512)
    ('135M', '4.9M', '1.6B', '512')
    """
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.{0 if count >= 9.95 * unit else 1}f}{suffix}"
    return f"{count:g}"


def duration(hours: float) -> str:
    """
    >>> duration(0.005), duration(0.16), duration(1.5)
    ('18 s', '9.6 min', '1.5 h')
    """
    seconds = hours * 3600
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def memory(megabytes: float) -> str:
    """
    >>> memory(466), memory(2054.1)
    ('466 MB', '2.1 GB')
    """
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"
