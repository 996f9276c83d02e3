"""Flags made from the documented options, and the layers of a config made from flags."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import click
from pydantic.fields import FieldInfo

from seedbed.cli.verb import unknown_flags
from seedbed.config import (
    FLAGS,
    REGIMES,
    Config,
    Layer,
    ModelOptions,
    SamplingOptions,
    Section,
    option_names,
    read_config_file,
    read_run_options,
    read_section,
    resolve,
)
from seedbed.errors import ConfigError
from seedbed.model.shape import contradictions

Sampling = TypeVar("Sampling", bound=SamplingOptions)

TEXTS = ("data", "val_data", "general_data")
"""Flags whose second value would not replace the first in the eyes of those who give both."""

OF_PRESETS = ("max_seq_len", "batch_size", "learning_rate")
"""Options with a default of which some sizes of model that `--model` names have their own value."""

ONLY_SAMPLED = ("temperature", "top_k", "top_p")
"""Options that change nothing where the likeliest token is always taken."""

PRETRAINED = {
    "model": "The model to begin with: a model folder, a run or one of its checkpoints, or a hub id.",
    "tokenizer": "A tokenizer folder or hub id with the model's tokens; by default the model's own.",
    "vocab_size": "Not for a pretrained model, which has a tokenizer already.",
    "max_seq_len": "Context length: tokens in one row of a batch; at most what the model allows.",
}
"""What options mean where a pretrained model is trained, if that is not what they mean from scratch."""

CONTINUED = {
    "learning_rate": "Peak learning rate; without --lora, a model trained here takes half of its old peak instead.",
}
"""The same where a domain is added."""


class SectionOption(click.Option):
    """A flag that belongs to a documented section; its value is checked later, with all the others.

    Its help names its default: the one in `values`, else the one of `regimes`.
    """

    def __init__(
        self,
        name: str,
        field: FieldInfo,
        section: type[Section],
        regimes: Sequence[str],
        values: Mapping[str, Any],
        *,
        with_presets: bool,
    ) -> None:
        self.section = section.__doc__ or ""
        description = field.description or ""
        if "scratch" not in regimes:
            description = PRETRAINED.get(name, description)
        if "continue" in regimes:
            description = CONTINUED.get(name, description)
        if name in values:
            default = f" [{values[name]}]"
            description = description.partition("; by default")[0].removesuffix(".") + "."
        else:
            default = _default(name, field, regimes)
            if with_presets and name in OF_PRESETS:
                default = default.replace("]", ", or the preset's]")
        many, is_text = typing.get_origin(field.annotation) is tuple, name in TEXTS
        flag = f"--{name}/--no_{name}" if _is_bool(field) else f"--{name}"
        super().__init__(
            [flag],
            default=None,
            multiple=many or is_text,
            callback=_only_one if is_text else None,
            type=None if _is_bool(field) else str,
            metavar=None if _is_bool(field) else _metavar(field),
            help=f"{description}{default}",
        )


def _only_one(_ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    if len(values) > 1:
        raise ConfigError(
            f"--{option.name} is given {len(values)} times ({', '.join(values)}); "
            "name a folder, or a glob in quotes, that holds them all"
        )
    return values[0] if values else None


def sections(
    *classes: type[Section],
    regimes: Sequence[str] = ("scratch",),
    values: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
) -> Callable[[Any], Any]:
    """Give a command the flags of these sections.

    Args:
        classes: the sections.
        regimes: for which defaults are shown, where they depend on the regime.
        values: what the command itself puts in place of defaults.
        without: options that mean nothing to the command.
    """
    own, with_presets = values or {}, ModelOptions in classes

    def decorate(command: Any) -> Any:
        for section in reversed(classes):
            for name, field in reversed(section.model_fields.items()):
                if name in without:
                    continue
                option = SectionOption(name, field, section, regimes, own, with_presets=with_presets)
                command.__click_params__ = [*getattr(command, "__click_params__", []), option]
        return command

    return decorate


config_option = click.option(
    "--config",
    metavar="FILE.yaml|PRESET",
    help="YAML file with options under the names of the flags, or a preset; flags win.",
)
from_option = click.option(
    "--from", "from_run", metavar="RUN", help="Begin with the options chosen for another run; --config and flags win."
)


def resolved(
    ctx: click.Context,
    regime: str,
    *,
    below: Sequence[Layer] = (),
    needs_text: bool = False,
) -> Config:
    """The config that `--from`, the file and the flags make, over the layers `below`.

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
    flags = given(ctx, option_names(regime))
    layers.append(Layer(FLAGS, {**flags, **dict.fromkeys(unknown_flags(ctx), "")}))
    return resolve(regime, layers, unread, needs_text=needs_text, also=contradictions)


def given(ctx: click.Context, names: Iterable[str]) -> dict[str, Any]:
    """The values of the flags that were typed."""
    return {name: ctx.params[name] for name in names if ctx.params.get(name) not in (None, ())}


def read_sampling(ctx: click.Context, section: type[Sampling]) -> Sampling:
    """How text is written, as the flags say it.

    Raises:
        ConfigError: wrong values, or flags that mean nothing.
    """
    values = given(ctx, section.model_fields)
    options = read_section(section, values, FLAGS)
    if options.greedy and (vain := [name for name in ONLY_SAMPLED if name in values]):
        remedy = "with --greedy; leave one of them out"
        if "greedy" not in values:
            remedy = "without --no_greedy; add it, or leave it out"
        raise ConfigError([f"--{name} has no meaning {remedy}" for name in vain])
    return options


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
            return " [" + ", with LoRA ".join(f"{value:g}" for value in values.values()) + "]"
        value = values[regimes[0]]
        return f" [{value:g}]" if isinstance(value, float) else f" [{value}]" if value else ""
    if field.default in (None, "", ()):
        return ""
    if isinstance(field.default, bool):
        return f" [{'on' if field.default else 'off'}]"
    return f" [{field.default}]"
