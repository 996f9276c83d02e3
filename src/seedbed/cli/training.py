"""Verbs that train, or say what training would take."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.options import Verb, layers, sections
from seedbed.config import (
    SECTIONS,
    TRAINED_HERE,
    Config,
    DataOptions,
    Layer,
    ModelOptions,
    SamplingOptions,
    option_names,
    read_config_file,
    resolve,
)

config_option = click.option(
    "--config", metavar="FILE.yaml|PRESET", help="Values under the same names as the flags; flags win."
)


@click.command(
    cls=Verb,
    epilog="Example: seedbed pretrain --data book.txt --model tiny --epochs 5. "
    "The same command again goes on with an unfinished run.",
)
@config_option
@json_option
@sections(*SECTIONS)
@click.pass_context
def pretrain(ctx: click.Context, /, config: str | None, as_json: bool, **_flags: Any) -> int:
    """Train a language model from scratch."""
    resolved = resolve("scratch", layers(ctx, option_names(), config))
    return _train(resolved, make_console(as_json), as_json)


@click.command(cls=Verb, epilog="Example: seedbed demo")
@json_option
@sections(*SECTIONS)
@click.pass_context
def demo(ctx: click.Context, /, as_json: bool, **_flags: Any) -> int:
    """The tour: train on the documentation inside your own Python, evaluate, generate. About two minutes."""
    output = Layer("preset demo", {"output": "runs/demo"})
    resolved = resolve("scratch", [read_config_file("demo"), output, *layers(ctx, option_names())])
    console = make_console(as_json)
    if code := _train(resolved, console, as_json):
        return code
    _tour(str(resolved.watching.output), console)
    return 0


def _train(config: Config, console: Console, as_json: bool) -> int:
    from seedbed.train.pretrain import pretrain as run_pretraining

    outcome = run_pretraining(config, console)
    if as_json:
        print_json({"run": str(outcome.path), **outcome.summary})
    return outcome.exit_code


def _tour(run: str, console: Console) -> None:
    """Evaluate on the documents held out, write a little, and say what to type next."""
    from seedbed.cli.models import held_out_evaluation
    from seedbed.generate import generate as write

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    model, tokenizer, result = held_out_evaluation(run, console)
    say()
    say(
        f"On {result.tokens:,} tokens it has never seen: perplexity {result.token_ppl:.2f} a token, "
        f"{result.word_ppl:,.0f} a word, {result.bits_per_byte:.3f} bits per byte"
    )
    options = SamplingOptions(max_new_tokens=60)
    for completion in write(model, tokenizer, ["Return the", "If the file"], options):
        say()
        say(f"> {completion.prompt}{completion.text}")
    say()
    say("What to type next:")
    program, folder = _program()
    say(f"  {program} generate --model {run} --prompt 'The class'")
    say(f"  {program} evaluate --model {run}")
    say(f"  {program} pretrain --data YOUR_TEXT.txt --model tiny --epochs 5")
    say(f"  {folder}tensorboard --logdir {run}/tensorboard")
    say(
        f"The checkpoint opens in transformers as it is: AutoModelForCausalLM.from_pretrained('{run}/checkpoints/best')"
    )


def _program() -> tuple[str, str]:
    """How this program was called, so that its hints can be typed as they are, and the folder it is in."""
    if shutil.which("seedbed"):
        return "seedbed", ""
    if Path(sys.argv[0]).name == "seedbed":
        return sys.argv[0], f"{Path(sys.argv[0]).parent}/"
    return f"{sys.executable} -m seedbed", f"{Path(sys.executable).parent}/"


@click.group()
def plan() -> None:
    """What a run would take, before it starts."""


@plan.command("pretrain", cls=Verb, epilog="Example: seedbed plan pretrain --model gpt2-medium")
@config_option
@json_option
@sections(*SECTIONS)
@click.pass_context
def plan_pretrain(ctx: click.Context, /, config: str | None, as_json: bool, **_flags: Any) -> None:
    """The parameters of a model and the memory that they take; needs no data and no weights."""
    resolved = resolve("scratch", layers(ctx, option_names(), config))
    facts = _parameters(resolved.model, resolved.data)
    if as_json:
        print_json(facts)
        return
    assumed = resolved.data.vocab_size is None and resolved.data.tokenizer in TRAINED_HERE
    print_facts(
        {
            "Parameters": f"{facts['parameters']:,}",
            "Trainable": f"{facts['trainable_parameters']:,}",
            "Weights": f"{facts['parameters_mb']:,.1f} MB in float32",
            "Vocabulary": f"{facts['vocab_size']:,}{' (assumed; see --vocab_size)' if assumed else ''}",
        }
    )


def _parameters(model: ModelOptions, data: DataOptions) -> dict[str, Any]:
    from seedbed.model.decoder import num_parameters
    from seedbed.text.tokenizer import Tokenizer
    from seedbed.train.build import ASSUMED_VOCAB, decoder_config

    if data.tokenizer in TRAINED_HERE:
        vocab_size = data.vocab_size or ASSUMED_VOCAB
    else:
        vocab_size = Tokenizer.load(data.tokenizer).vocab_size
    parameters = num_parameters(decoder_config(model, data, vocab_size))
    return {
        "parameters": parameters,
        "trainable_parameters": parameters,
        "parameters_mb": round(parameters * 4 / 2**20, 2),
        "vocab_size": vocab_size,
    }
