"""Where a verb's words go: people read standard output, unless a program asked for JSON there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

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


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
