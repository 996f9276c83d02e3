"""The page of all options, made from the code: `make docs` writes it to docs/options.md."""

from __future__ import annotations

import inspect

import click

from seedbed.cli.app import cli
from seedbed.cli.options import SectionOption
from seedbed.config import REGIMES, SECTIONS, AdaptOptions, KeepOptions, ModelOptions, preset_names, read_preset

INTRO = """# Every option

Made from the code by `make docs`. Flags take underscores or hyphens (`--max_steps`, `--max-steps`).
`--config FILE.yaml` gives values under the same names; a flag wins over the file, the file over the preset that
`--model` names, the preset over the regime, the regime over the defaults here. The `config.yaml` of a run says for
each value where it came from.
"""


ONLY = {
    ModelOptions: " (to fine-tune and continue: `model` and `dropout`)",
    AdaptOptions: " (to fine-tune and continue)",
    KeepOptions: " (of `continue`)",
}


def reference() -> str:
    """The whole page as Markdown."""
    parts = [INTRO, "## Options of `pretrain`, `finetune`, `continue`, `demo` and `plan`\n"]
    commands = dict(_verbs(cli))
    options = {
        option.name: option
        for verb in ("continue", "finetune", "pretrain")
        for option in commands[verb].params
        if isinstance(option, SectionOption)
    }
    for section in SECTIONS:
        parts.append(f"### {section.__doc__}{ONLY.get(section, '')}\n")
        parts.append(_table([options[name] for name in section.model_fields]))
    parts.append("## Values that depend on the regime\n")
    for regime in REGIMES:
        known = {name: value for name, value in REGIMES[regime].defaults.items() if value}
        parts.append(f"`{regime}`: " + ", ".join(f"`{name}` {value}" for name, value in known.items()) + "\n")
    parts.append("## Presets\n\n| preset | values |\n|---|---|")
    for name in preset_names():
        preset = ", ".join(f"`{key}` {value}" for key, value in read_preset(name).items())
        parts.append(f"| `{name}` | {preset} |")
    parts.append("\n## The other verbs\n")
    for name, command in commands.items():
        own = [o for o in command.params if isinstance(o, click.Option) and o.name not in options]
        parts.append(f"### `seedbed {name}`\n\n{inspect.cleandoc(command.help or '')}\n")
        if name.removeprefix("plan ") not in ("pretrain", "finetune", "continue", "demo") and own:
            parts.append(_table(own))
    return "\n".join(parts)


def _verbs(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        path = f"{prefix}{name}"
        found += _verbs(command, f"{path} ") if isinstance(command, click.Group) else [(path, command)]
    return found


def _table(options: list[SectionOption] | list[click.Option]) -> str:
    rows = ["| option | value | meaning |", "|---|---|---|"]
    for option in options:
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        kind = option.metavar or str(option.type.name).upper().removesuffix(" RANGE")
        value = "" if option.is_flag else kind.replace("|", " \\| ")
        rows.append(f"| {names} | {value} | {(option.help or '').replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
