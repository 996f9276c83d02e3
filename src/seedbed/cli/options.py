"""Flags made from the documented options, and the layers of a config made from flags."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import click
from pydantic.fields import FieldInfo

from seedbed.cli.verb import unknown_flags
from seedbed.config import (
    FLAGS,
    REGIMES,
    Config,
    Layer,
    Section,
    option_names,
    read_config_file,
    read_run_options,
    resolve,
)
from seedbed.errors import ConfigError

TEXTS = ("data", "val_data", "general_data")
"""Flags whose second value would not replace the first in the eyes of those who give both."""


class SectionOption(click.Option):
    """A flag that belongs to a documented section; its value is checked later, with all the others."""

    def __init__(self, name: str, field: FieldInfo, section: type[Section], regimes: Sequence[str]) -> None:
        self.section = section.__doc__ or ""
        many, is_text = typing.get_origin(field.annotation) is tuple, name in TEXTS
        flag = f"--{name}/--no_{name}" if _is_bool(field) else f"--{name}"
        super().__init__(
            [flag],
            default=None,
            multiple=many or is_text,
            callback=_only_one if is_text else None,
            type=None if _is_bool(field) else str,
            metavar=None if _is_bool(field) else _metavar(field),
            help=f"{field.description}{_default(name, field, regimes)}",
        )


def _only_one(_ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    if len(values) > 1:
        raise ConfigError(
            f"--{option.name} is given {len(values)} times ({', '.join(values)}); "
            "name a folder, or a glob in quotes, that holds them all"
        )
    return values[0] if values else None


def sections(*classes: type[Section], regimes: Sequence[str] = ("scratch",)) -> Callable[[Any], Any]:
    """Give a command the flags of these sections; defaults that depend on the regime are shown for `regimes`."""

    def decorate(command: Any) -> Any:
        for section in reversed(classes):
            for name, field in reversed(section.model_fields.items()):
                option = SectionOption(name, field, section, regimes)
                command.__click_params__ = [*getattr(command, "__click_params__", []), option]
        return command

    return decorate


config_option = click.option(
    "--config", metavar="FILE.yaml|PRESET", help="Values under the same names as the flags; flags win."
)
from_option = click.option(
    "--from", "from_run", metavar="RUN", help="Begin with the options of another run, its parent; file and flags win."
)


def resolved(
    ctx: click.Context,
    regime: str,
    *,
    below: Sequence[Layer] = (),
    names: Iterable[str] | None = None,
    needs_text: bool = False,
) -> Config:
    """The config that `--from`, the file and the flags (or `names` of them) make, over the layers `below`.

    needs_text: whether nothing can be done without `--data`.

    Raises:
        ConfigError: everything that is wrong, a run or a file that cannot be read and unknown flags among it.
    """
    layers, unread = list(below), list[str]()
    for read, name in ((partial(read_run_options, regime), "from_run"), (read_config_file, "config")):
        if ctx.params.get(name):
            try:
                layers.append(read(ctx.params[name]))
            except ConfigError as error:
                unread += error.problems
    flags = given(ctx, option_names(regime) if names is None else names)
    layers.append(Layer(FLAGS, {**flags, **dict.fromkeys(unknown_flags(ctx), "")}))
    return resolve(regime, layers, unread, needs_text=needs_text)


def given(ctx: click.Context, names: Iterable[str]) -> dict[str, Any]:
    """The values of the flags that were typed."""
    return {name: ctx.params[name] for name in names if ctx.params.get(name) not in (None, ())}


def _is_bool(field: FieldInfo) -> bool:
    return "bool" in str(field.annotation)


def _metavar(field: FieldInfo) -> str:
    choices = [arg for arg in typing.get_args(field.annotation) if arg is not type(None)]
    if typing.get_origin(field.annotation) is typing.Literal:
        return "|".join(choices)
    for choice in choices:
        if typing.get_origin(choice) is typing.Literal:
            return "|".join(typing.get_args(choice))
    text = str(field.annotation)
    return "INTEGER" if "int" in text else "NUMBER" if "float" in text else "TEXT"


def _default(name: str, field: FieldInfo, regimes: Sequence[str]) -> str:
    if field.is_required():
        values = {regime: REGIMES[regime].defaults[name] for regime in regimes}
        if len(set(values.values())) > 1:
            return " [" + ", ".join(f"{value:g} {regime}" for regime, value in values.items()) + "]"
        value = values[regimes[0]]
        return f" [{value:g}]" if isinstance(value, float) else f" [{value}]" if value else ""
    if field.default in (None, "", ()):
        return ""
    if isinstance(field.default, bool):
        return f" [{'on' if field.default else 'off'}]"
    return f" [{field.default}]"
