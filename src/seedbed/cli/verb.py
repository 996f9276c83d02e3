"""What every verb has: help by sections, hyphens for underscores, unknown flags reported with the nearest known one."""

from __future__ import annotations

from typing import Any

import click

from seedbed.errors import ConfigError, did_you_mean

OF_DATA = ("--format", "--text_column", "--document", "--split")
COMMANDLINE = click.core.ParameterSource.COMMANDLINE

SETTINGS = {
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "max_content_width": 110,
    # Unknown flags are kept, so that they can be reported together with everything else that is wrong.
    "ignore_unknown_options": True,
    "allow_extra_args": True,
}


class Verb(click.Command):
    """A command whose help shows its flags by section and which takes hyphens for underscores."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        kwargs["context_settings"] = SETTINGS
        super().__init__(name, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                groups.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def unknown_flags(ctx: click.Context) -> list[str]:
    """Names of flags that no option has.

    Raises:
        ConfigError: words that belong to no flag.
    """
    unknown = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in ctx.args if word.startswith("-")]
    if ctx.args and not unknown:
        raise ConfigError(f"unexpected argument {ctx.args[0]!r}; values follow a flag (see --help)")
    return unknown


def refuse_without_data(ctx: click.Context) -> None:
    """Raise ConfigError for flags that say how `--data` is read where a run's own text is taken instead."""
    if ctx.params["data"]:
        return
    typed = [option for option in ctx.command.params if ctx.get_parameter_source(option.name or "") is COMMANDLINE]
    if vain := [option.opts[0] for option in typed if option.opts[0] in OF_DATA]:
        raise ConfigError([f"{flag} has no meaning without --data; name the text, or leave it out" for flag in vain])


def refuse_unknown(ctx: click.Context) -> None:
    """Raise ConfigError for unknown flags of a command without a config."""
    flags = (flag for option in ctx.command.params for flag in (*option.opts, *option.secondary_opts))
    known = [flag.lstrip("-") for flag in flags if flag.startswith("--")]
    if names := unknown_flags(ctx):
        raise ConfigError([f"unknown option --{name}{did_you_mean(name, known)}" for name in names])
