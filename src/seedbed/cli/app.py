"""The program: its verbs, and what every one of them does with an error."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

import click

from seedbed import __version__
from seedbed.errors import ConfigError, OutOfMemoryError, SeedbedError

UNUSABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)
SHOWN = 80  # characters of a name
VERBS = {
    "demo": ("training:demo", "A tour: train on text inside your own Python, evaluate, generate."),
    "pretrain": ("training:pretrain", "Train a language model from scratch."),
    "finetune": ("training:finetune", "Adapt a pretrained model to your text or your instructions."),
    "continue": ("training:continue_", "Teach a model a new domain while it keeps what it knew."),
    "plan": ("plan:plan", "What a run will cost and what may go wrong, before it starts."),
    "diagnose": ("diagnose:diagnose", "What went wrong in a run, and what to change."),
    "runs": ("runs:runs", "List, show, compare and annotate runs; write report pages."),
    "sweep": ("sweep:sweep", "Train every run that a file describes, and compare them."),
    "judge": ("judge:judge", "Let a model score answers from 0 to 100, with a 95 % interval."),
    "evaluate": ("models:evaluate", "Measure loss, perplexity and bits per byte of a model on text."),
    "generate": ("models:generate", "Let a model write text."),
    "chat": ("models:chat", "Talk to a model that was taught to answer."),
    "data": ("inspect:data", "List named sources; show what a model will see of your data."),
    "tokenizer": ("inspect:tokenizer", "Train a tokenizer, or inspect one."),
    "import": ("convert:import_model", "Convert a .gguf file or a model from the hub to a model folder."),
    "export": ("convert:export", "Write what was trained as a model for other programs."),
    "verify": ("inspect:verify", "Check every byte of a checkpoint."),
}
"""Each verb's place below `seedbed.cli`, and what it does in one line. In the order that help shows them."""


class Verbs(click.Group):
    """Imports a verb when it is called, so that looking at a table of runs does not wait for training."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in VERBS:
            return None
        module, _, attribute = VERBS[name][0].partition(":")
        command = getattr(importlib.import_module(f"seedbed.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl([(name, does) for name, (_, does) in VERBS.items()])


@click.group(
    cls=Verbs,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="Begin with `seedbed demo`. Each verb explains itself: `seedbed VERB --help`.",
)
@click.version_option(__version__, prog_name="seedbed")
def cli() -> None:
    """Grow small language models on the machine you have, and know what is going wrong."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit code."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the encoding of a terminal or a pipe has no characters for
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors that a user can act on are printed without a traceback."""
    try:
        _require_utf8(sys.argv[1:] if arguments is None else arguments)
        code = cli.main(arguments, prog_name="seedbed", standalone_mode=False)
    except SeedbedError as error:
        _show(error)
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
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        beginning = str(error).partition("\n")[0][: 2 * SHOWN] or "the system gives no more"
        _show(OutOfMemoryError(f"out of memory ({beginning}); lower --batch_size or --max_seq_len, or free some"))
        return OutOfMemoryError.exit_code
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        _show(ConfigError(f"{str(error.filename)[:SHOWN]}: {error.strerror}; name another file or folder"))
        return ConfigError.exit_code
    return code if isinstance(code, int) else 0


def _is_out_of_memory(error: BaseException) -> bool:
    """Also as torch says it, which is not loaded for every verb."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from seedbed.device import is_out_of_memory

    return is_out_of_memory(error)


def _require_utf8(arguments: Sequence[str]) -> None:
    """Python lets other bytes through as halves of surrogate pairs, which no file can be written with."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(f"{argument[:SHOWN]!a}: not text in UTF-8; correct it, or rename what it names")


def _show(error: SeedbedError) -> None:
    """Once, of the processes that torchrun started together; before they have met, once on each machine."""
    if os.environ.get("LOCAL_RANK", "0") != "0" if error.told is None else error.told:
        return
    for line in str(error).splitlines():
        click.echo(f"error: {line}", err=True)
