"""Verbs that train."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from seedbed.cli.console import json_option, make_console, print_json, say
from seedbed.cli.options import config_option, from_option, resolved, sections
from seedbed.cli.verb import Verb
from seedbed.config import (
    REGIMES,
    Config,
    Layer,
    SamplingOptions,
    read_config_file,
    read_preset,
)
from seedbed.errors import ConfigError
from seedbed.runs.folder import read_summary

FINETUNING = ("finetune", "lora")
CONTINUING = ("continue", "continue-lora")
DEMO = {"output": "runs/demo"}


@click.command(
    cls=Verb,
    epilog="Example: seedbed pretrain --data book.txt --model tiny --epochs 5. "
    "The same command again resumes an unfinished run.",
)
@config_option
@from_option
@json_option
@sections(*REGIMES["scratch"].sections)
@click.pass_context
def pretrain(ctx: click.Context, /, as_json: bool, **_flags: Any) -> int:
    """Train a language model from scratch.

    The preset that --model names gives the model's shape; some presets also give a context length, a batch size or a
    learning rate of their own (small, the default, a learning rate of 0.001). A flag wins over the preset.
    """
    return _train(resolved(ctx, "scratch", needs_text=True), make_console(as_json), as_json)


@click.command(
    cls=Verb,
    epilog="Examples: seedbed finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data questions.json --lora; "
    "seedbed finetune --model gpt2 --data book.txt. The same command again resumes an unfinished run.",
)
@config_option
@from_option
@json_option
@sections(*REGIMES["finetune"].sections, regimes=FINETUNING)
@click.pass_context
def finetune(ctx: click.Context, /, as_json: bool, **_flags: Any) -> int:
    """Adapt a pretrained model to your text or your instructions: in full, in part, or with LoRA."""
    return _train(resolved(ctx, "finetune", needs_text=True), make_console(as_json), as_json)


@click.command(
    "continue",
    cls=Verb,
    epilog="Examples: seedbed continue --model runs/book --data medical.txt --domain medical; "
    "seedbed continue --model runs/medical-book --data law.txt --domain law --replay 0.1 --max_forgetting 0.02. "
    "`seedbed runs show RUN --lineage` draws what was learnt and what was forgotten.",
)
@config_option
@from_option
@json_option
@sections(*REGIMES["continue"].sections, regimes=CONTINUING)
@click.pass_context
def continue_(ctx: click.Context, /, as_json: bool, **_flags: Any) -> int:
    """Teach a model a new domain, keep what it knew, and measure both.

    The model's folder remembers its domains: held-out text of each, some training text to replay, and all figures.
    --rollback_to without --data copies the model as it was after that domain to --output.
    """
    config = resolved(ctx, "continue", needs_text=True)
    if config.keeping.rollback_to and config.data.data is None and not config.watching.resume_from:
        return _roll_back(config, as_json)
    return _train(config, make_console(as_json), as_json)


def _roll_back(config: Config, as_json: bool) -> int:
    """Copy an earlier stage of a model to a folder of its own."""
    from seedbed.train.continual.memory import copy_stage

    if config.watching.output is None:
        raise ConfigError(
            "--output is missing: name a folder for the model as it was (or give --data to go on from it)"
        )
    stage = copy_stage(config.model.model, str(config.keeping.rollback_to), Path(config.watching.output))
    if as_json:
        print_json({"model": config.watching.output, "domain": config.keeping.rollback_to, "copied_from": str(stage)})
    else:
        click.echo(f"{config.watching.output} is the model as it was after {config.keeping.rollback_to} ({stage})")
    return 0


@click.command(cls=Verb, epilog="Example: seedbed demo")
@json_option
@sections(*REGIMES["scratch"].sections, values=read_preset("tiny") | read_preset("demo") | DEMO)
@click.pass_context
def demo(ctx: click.Context, /, as_json: bool, **_flags: Any) -> int:
    """A tour of about two minutes: train on the documentation inside your own Python, evaluate, generate.

    It takes the flags of `pretrain`; the preset `demo` gives their defaults.
    """
    below = [read_config_file("demo"), Layer("preset demo", DEMO)]
    config, console = resolved(ctx, "scratch", below=below), make_console(as_json)
    if code := _train(config, console, as_json):
        return code
    _tour(str(config.watching.output), console)
    return 0


def _train(config: Config, console: Console, as_json: bool) -> int:
    from seedbed.train.run import run_training

    outcome = run_training(config, console)
    if as_json:
        print_json({"run": str(outcome.path), **outcome.summary})
    return outcome.exit_code


def _tour(run: str, console: Console) -> None:
    """Evaluate on the documents held out, if any, write a little, and say what to type next."""
    from seedbed.checkpoint import find_model, load_model
    from seedbed.cli.models import held_out_evaluation
    from seedbed.generate import generate as write

    model, tokenizer = load_model(run)
    validated = read_summary(Path(run)).get("best_val_loss") is not None
    if validated:
        result = held_out_evaluation(run, model, tokenizer, console)
        say(console)
        say(
            console,
            f"On {result.tokens:,} tokens it has never seen: perplexity {result.token_ppl:.2f} a token, "
            f"{result.word_ppl:,.0f} a word, {result.bits_per_byte:.3f} bits per byte",
        )
    options = SamplingOptions(max_new_tokens=60)
    for completion in write(model, tokenizer, ["Return the", "If the file"], options):
        say(console)
        say(console, f"> {completion.prompt}{completion.text}")
    say(console)
    say(console, "What to type next:")
    program, folder = _program()
    say(console, f"  {program} generate --model {run} --prompt 'The class'")
    say(console, f"  {program} evaluate --model {run}" + ("" if validated else " --data YOUR_TEXT.txt"))
    say(console, f"  {program} pretrain --data YOUR_TEXT.txt --model tiny --epochs 5")
    say(console, f"  {folder}tensorboard --logdir {run}/tensorboard")
    opened = f"AutoModelForCausalLM.from_pretrained('{find_model(run)}')"
    say(console, f"The checkpoint opens in transformers as it is: {opened}")


def _program() -> tuple[str, str]:
    """How this program was called, so that its hints can be typed as they are, and the folder it is in."""
    if shutil.which("seedbed"):
        return "seedbed", ""
    if Path(sys.argv[0]).name == "seedbed":
        return sys.argv[0], f"{Path(sys.argv[0]).parent}/"
    return f"{sys.executable} -m seedbed", f"{Path(sys.executable).parent}/"
