"""The program: its verbs, and what every one of them does with an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from seedbed import __version__
from seedbed.cli.convert import export, import_model
from seedbed.cli.inspect import data, tokenizer, verify
from seedbed.cli.models import chat, evaluate, generate
from seedbed.cli.plan import plan
from seedbed.cli.runs import runs
from seedbed.cli.training import continue_, demo, finetune, pretrain
from seedbed.errors import SeedbedError


@click.group(
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="Begin with `seedbed demo`. Each verb explains itself: `seedbed VERB --help`.",
)
@click.version_option(__version__, prog_name="seedbed")
def cli() -> None:
    """Grow small language models on the machine you have, and know what is going wrong."""


for verb in (
    demo,
    pretrain,
    finetune,
    continue_,
    plan,
    evaluate,
    generate,
    chat,
    export,
    import_model,
    tokenizer,
    data,
    runs,
    verify,
):
    cli.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors that a user can act on are printed without a traceback."""
    try:
        code = cli.main(arguments, prog_name="seedbed", standalone_mode=False)
    except SeedbedError as error:
        lines = str(error).splitlines()
        for line in lines:
            click.echo(f"error: {line}", err=True)
        return error.exit_code
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    return code if isinstance(code, int) else 0
