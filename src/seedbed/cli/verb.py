"""What every verb has: help by sections, hyphens for underscores, unknown flags reported with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it, but that of several values that are wrong or missing every one is reported."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter:
            values, _, _ = self.make_parser(ctx).parse_args(words)
            problems: list[str] = []
            for parameter in self.get_params(ctx):
                with noting(problems):
                    parameter.handle_parse_result(ctx, values, [])
            if len(problems) < 2:
                raise  # with its line on how to get help
            raise ConfigError(problems) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                groups.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


@contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """Gather what is wrong, for all of it to be reported at once (`report`)."""
    try:
        yield
    except click.BadParameter as error:
        problems.append(error.format_message())
    except ConfigError as error:
        problems += error.problems


def report(problems: list[str]) -> None:
    """Raise ConfigError if there are any."""
    if problems:
        raise ConfigError(problems)


def unknown_flags(ctx: click.Context) -> list[str]:
    """Names of flags that no option has.

    Raises:
        ConfigError: words that belong to no flag.
    """
    unknown = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in ctx.args if word.startswith("-")]
    if ctx.args and not unknown:
        raise ConfigError(f"unexpected argument {ctx.args[0]!r}; values follow a flag (see --help)")
    return unknown


def wrong_flags(ctx: click.Context) -> list[str]:
    """What is wrong with the names of a command's flags: unknown, or about `--data` where a run's own text is taken."""
    flags = (flag for option in ctx.command.params for flag in (*option.opts, *option.secondary_opts))
    known = [flag.lstrip("-") for flag in flags if flag.startswith("--")]
    unknown = [f"unknown option --{name}{did_you_mean(name, known)}" for name in unknown_flags(ctx)]
    if ctx.params.get("data", True):
        return unknown
    typed = [option for option in ctx.command.params if ctx.get_parameter_source(option.name or "") is COMMANDLINE]
    vain = [option.opts[0] for option in typed if option.opts[0] in OF_DATA]
    return [*unknown, *(f"{flag} has no meaning without --data; name the text, or leave it out" for flag in vain)]


def refuse_unknown(ctx: click.Context) -> None:
    """Raise ConfigError for all of `wrong_flags`, in a command without a config."""
    report(wrong_flags(ctx))
