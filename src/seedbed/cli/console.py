"""Where a verb's words go: people read standard output, unless a program asked for JSON there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
"""Characters in a line of sentences."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


def make_console(as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json)


def is_first() -> bool:
    """Whether this process prints results; of those that torchrun started together, one does."""
    return os.environ.get("RANK", "0") == "0"


def print_json(result: Mapping[str, Any]) -> None:
    if is_first():
        click.echo(json.dumps(result, allow_nan=False))


def say(console: Console, text: str = "") -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines without control characters, which could write anywhere in a terminal."""
    for line in lines:
        click.echo("".join(character if character.isprintable() else "?" for character in line))


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    for line in fact_lines(facts):
        click.echo(line)


def fact_lines(facts: Mapping[str, object]) -> list[str]:
    """Names and values in two columns."""
    width = max(map(len, facts), default=0)
    return [f"{name:<{width}}  {value}" for name, value in facts.items()]


def wrapped(sentence: str, width: int = WIDTH) -> list[str]:
    """A sentence in lines; words and names with hyphens stay whole."""
    return wrap(sentence, width, break_on_hyphens=False, break_long_words=False)
