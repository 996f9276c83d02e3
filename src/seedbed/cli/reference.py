"""The page of all options, made from the code: `make docs` writes it to docs/options.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import click

from seedbed.cli.app import cli
from seedbed.cli.options import CONTINUED, PRETRAINED, SectionOption
from seedbed.config import REGIMES, SECTIONS, ModelOptions, preset_names, read_preset

INTRO = """# Every option

Made from the code by `make docs`. Flags take underscores or hyphens (`--max_steps`, `--max-steps`), and every verb has
`-h` and `--help`. The default is in brackets.
"""

LAYERS = """`--config FILE.yaml` gives values under the names of the flags. A flag wins over the file, the file over the
run that `--from` names, that run over the preset that `--model` names, the preset over the regime, the regime over the
defaults here. The `config.yaml` of a run says where each value came from.

- `pretrain` has the sections {scratch}. So has `demo`, which starts from the preset `demo`.
- `finetune` has {finetune}.
- `continue` has {continued}.
- `plan VERB` has those of its verb.
"""

TRAINING = ("pretrain", "finetune", "continue", "demo")


def reference() -> str:
    """The whole page as Markdown."""
    commands = dict(_verbs(cli))
    shared = {regime: _titles(regime) for regime in ("scratch", "finetune", "continue")}
    layers = LAYERS.format(scratch=shared["scratch"], finetune=shared["finetune"], continued=shared["continue"])
    parts = [INTRO, "## Options of `pretrain`, `finetune`, `continue`, `demo` and `plan`\n", layers]
    options = {
        option.name: option
        for verb in ("continue", "finetune", "pretrain")
        for option in commands[verb].params
        if isinstance(option, SectionOption)
    }
    for section in SECTIONS:
        parts.append(f"### {section.__doc__}\n")
        if section is ModelOptions:
            parts.append("`finetune` and `continue` have `--model` and `--dropout` only.\n")
        parts.append(_table([options[name] for name in section.model_fields]))
    parts.append("### For a pretrained model\n\nWith `finetune` and `continue` these mean something else:\n")
    parts.append(_table([o for o in commands["finetune"].params if o.name in PRETRAINED]))
    parts.append("And with `continue`:\n")
    parts.append(_table([o for o in commands["continue"].params if o.name in CONTINUED]))
    parts.append("## Values that depend on the regime\n")
    for regime in REGIMES:
        known = {name: value for name, value in REGIMES[regime].defaults.items() if value}
        parts.append(f"`{regime}`: " + ", ".join(f"`{name}` {value}" for name, value in known.items()) + "\n")
    parts.append("## Presets\n\n| preset | values |\n|---|---|")
    for name in preset_names():
        preset = ", ".join(f"`{key}` {value}" for key, value in read_preset(name).items())
        parts.append(f"| `{name}` | {preset} |")
    parts.append("\n## Every verb\n")
    for name, command in commands.items():
        parts += _verb(name, command)
    return "\n".join(parts)


def _titles(regime: str) -> str:
    """The sections of a regime as a list in words."""
    *titles, last = (f"*{section.__doc__}*" for section in REGIMES[regime].sections)
    return f"{', '.join(titles)} and {last}"


def _verb(name: str, command: click.Command) -> Iterator[str]:
    """A verb's usage, what it does, and all of its options; those that all training verbs share are only named."""
    words = [_argument(argument) for argument in command.params if isinstance(argument, click.Argument)]
    yield f"### `{' '.join(['seedbed', name, *words])}`\n\n{inspect.cleandoc(command.help or '')}\n"
    own = [option for option in command.params if isinstance(option, click.Option)]
    if name.removeprefix("plan ") in TRAINING:
        own = [option for option in own if not isinstance(option, SectionOption)]
        yield "Besides the options above:\n"
    if own:
        yield _table(own)


def _argument(argument: click.Argument) -> str:
    """An argument as a usage line has it."""
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.required or name.startswith("[") or argument.nargs != 1 else f"[{name}]"


def _verbs(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        path = f"{prefix}{name}"
        found += _verbs(command, f"{path} ") if isinstance(command, click.Group) else [(path, command)]
    return found


def _table(options: Sequence[click.Parameter]) -> str:
    rows = ["| option | value | meaning |", "|---|---|---|"]
    for option in options:
        assert isinstance(option, click.Option)
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        required = " [required]" if option.required else ""
        rows.append(f"| {names} | {_escaped(_kind(option))} | {_escaped(option.help or '')}{required} |")
    return "\n".join(rows) + "\n"


def _kind(option: click.Option) -> str:
    """What follows a flag."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    return option.metavar or str(option.type.name).upper().removesuffix(" RANGE")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


if __name__ == "__main__":
    click.echo(reference(), nl=False)
