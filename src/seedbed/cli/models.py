"""Verbs that use a model: evaluate, generate and chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.options import read_sampling, sections
from seedbed.cli.verb import Verb, noting, report, wrong_flags
from seedbed.config import SamplingOptions
from seedbed.disk import expanded
from seedbed.errors import ConfigError, DataError
from seedbed.runs.info import is_run, read_run, run_of, was_taught_to_answer
from seedbed.text.template import find_template

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seedbed.evaluate import Evaluation
    from seedbed.generate import Completion
    from seedbed.model.decoder import Decoder
    from seedbed.text.template import Template
    from seedbed.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 1024

model_option = click.option(
    "--model",
    type=expanded,
    required=True,
    metavar="FOLDER",
    help="A checkpoint, a run (its best checkpoint is used), or any transformers folder.",
)
domain_option = click.option("--domain", help="Use the model as it was after this domain of its history.")
device_option = click.option("--device", default="auto", help="Where to run: auto, cpu, cuda, cuda:1, mps. [auto]")
precisions = click.Choice(["auto", "bf16", "fp16", "fp32"])
precision_option = click.option(
    "--precision",
    type=precisions,
    default="auto",
    help="Compute precision; auto picks what this hardware accelerates. [auto]",
)


@click.command(cls=Verb, epilog="Example: seedbed evaluate --model runs/demo --data other.txt --stride 128")
@model_option
@domain_option
@click.option("--data", help="Text to measure on, as for training; by default the documents that the run held out.")
@click.option(
    "--format",
    "form",
    default="auto",
    help="What --data holds: text, alpaca, qa, chat, completion; auto detects it. [auto]",
)
@click.option(
    "--chat_template", help="For conversations; by default the tokenizer's own template, else that of the format."
)
@click.option("--text_column", default="text", help="Column of JSON and Parquet rows that holds the text. [text]")
@click.option("--document", help="What separates documents in text files, as for training. [file]")
@click.option("--split", help="Which split of a named source: train, validation or test. [test, else validation]")
@click.option(
    "--max_seq_len",
    type=click.IntRange(min=1),
    help="Tokens predicted in one window. [the model's context, at most 1024]",
)
@click.option(
    "--stride", type=click.IntRange(min=1), help="Tokens from one window to the next. [--max_seq_len: no overlap]"
)
@click.option("--batch_size", type=click.IntRange(min=1), default=8, help="Windows in one batch. [8]")
@device_option
@click.option(
    "--precision",
    type=precisions,
    default="fp32",
    help="Compute precision; auto picks what this hardware accelerates: faster, some 0.001 nats off. [fp32]",
)
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    model: str,
    domain: str | None,
    data: str | None,
    form: str,
    chat_template: str | None,
    text_column: str,
    document: str | None,
    split: str | None,
    max_seq_len: int | None,
    stride: int | None,
    batch_size: int,
    device: str,
    precision: str,
    as_json: bool,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on text, or on the answers of conversations."""
    report(wrong_flags(ctx))
    model = at_domain(model, domain)
    from seedbed import distributed
    from seedbed.checkpoint import load_model
    from seedbed.data import open_whole
    from seedbed.device import autocast, pick_device, pick_precision

    with distributed.joined():
        if data:
            source = open_whole(data, text_column=text_column, document=document, split=split, format=form)
            documents, kind = source.documents(), source.format
        else:
            documents, kind = held_out_documents(model)
        if kind == "text" and chat_template:
            raise ConfigError(f"--chat_template {chat_template} is for conversations, and this is text; leave it out")
        place = distributed.local_device(pick_device(device))
        decoder, tokenizer = load_model(model, str(place))
        taught = not data or was_taught_to_answer(Path(model))
        template = None if kind == "text" else find_template(tokenizer, chat_template, kind, taught=taught)
        console = make_console(as_json) if distributed.is_first() else Console(quiet=True)
        with autocast(place, pick_precision(precision, place)):
            result = _measure(decoder, tokenizer, documents, console, template, max_seq_len, stride, batch_size)
        if not distributed.is_first():
            return
    facts = result.to_json(model, data or f"held out by {model}")
    if as_json:
        print_json(facts)
        return
    print_facts(
        {
            "Nats per token": f"{facts['nats_per_token']:.4f}",
            "Token perplexity": f"{facts['token_ppl']:.3f}" if facts["token_ppl"] else "too large",
            "Word perplexity": f"{facts['word_ppl']:,.3f}" if facts["word_ppl"] else "too large",
            "Bits per byte": f"{facts['bits_per_byte']:.4f}" if facts["bits_per_byte"] else "too large",
            "Tokens": f"{facts['tokens']:,}",
            "Words": f"{facts['words']:,}",
            "Bytes": f"{facts['bytes']:,}",
            "Context": facts["max_seq_len"],
            "Stride": facts["stride"],
            **({"Left out": f"{facts['left_out']:,} documents with nothing to predict"} if result.left_out else {}),
            **({"Cut": f"{facts['cut']:,} conversations longer than the context; --max_seq_len"} if result.cut else {}),
        }
    )


def at_domain(model: str, domain: str | None) -> str:
    """The model that was meant: itself, or where it was after a domain."""
    if domain is None:
        return model
    from seedbed.train.continual.memory import stage_folder

    return str(stage_folder(model, domain))


def _measure(
    decoder: Decoder,
    tokenizer: Tokenizer,
    documents: Iterator[str],
    console: Console,
    template: Template | None = None,
    max_seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    from seedbed.evaluate import evaluate as measure

    length = max_seq_len or min(DEFAULT_CONTEXT, decoder.config.max_seq_len)
    with console.status("Evaluating") as status:

        def report(tokens: int) -> None:
            status.update(f"Evaluating: {tokens:,} tokens")

        return measure(
            decoder,
            tokenizer,
            documents,
            max_seq_len=length,
            stride=stride,
            batch_size=batch_size,
            template=template,
            progress=report,
        )


def held_out_documents(model: str) -> tuple[Iterator[str], str]:
    """The documents that the run around a checkpoint held out, and their format.

    Raises:
        ConfigError: `model` does not belong to a run, or the run held nothing out.
    """
    from seedbed.checkpoint import find_model, read_state
    from seedbed.train.corpus import open_run_texts

    run = run_of(Path(model))
    if not is_run(run):
        raise ConfigError(f"--data is missing, and --model {model} is not part of a run with held-out documents")
    try:
        texts = open_run_texts(read_run(run).options, str(run))
    except DataError as error:
        raise DataError(f"{error} (so {run}/config.yaml names it; give --data)") from None
    if not texts.hold_out:
        raise ConfigError(f"--data is missing, and the run {run} held no documents out")
    if texts.validation is None and texts.changed_since(read_state(find_model(model)).get("text", "")):
        click.echo(
            f"Warning: {texts.train.name} is not the text that {run} learnt from: of what would be held out of it "
            "now, parts may have been learnt; give --data",
            err=True,
        )
    return texts.held_out_documents(), texts.train.format


def held_out_evaluation(run: str, decoder: Decoder, tokenizer: Tokenizer, console: Console) -> Evaluation:
    """How well a model predicts the documents that a run held out."""
    documents, _ = held_out_documents(run)
    return _measure(decoder, tokenizer, documents, console)


@click.command(cls=Verb, epilog="Example: seedbed generate --model runs/demo --prompt 'The class' --temperature 0.7")
@model_option
@domain_option
@click.option(
    "--prompt", multiple=True, help="Text to continue; may be given several times. Empty starts a new document."
)
@click.option("--prompt_file", type=expanded, metavar="PATH", help="A text file to continue.")
@click.option("--chat", is_flag=True, help="Ask each prompt as a question, in the model's chat template.")
@click.option("--system", help="With --chat, what the model is told before the question.")
@device_option
@precision_option
@json_option
@sections(SamplingOptions)
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    model: str,
    domain: str | None,
    prompt: tuple[str, ...],
    prompt_file: str | None,
    chat: bool,
    system: str | None,
    device: str,
    precision: str,
    as_json: bool,
    **_flags: Any,
) -> None:
    """Let a model continue a text, or answer with --chat; one prompt is streamed, several are written as a batch."""
    problems = wrong_flags(ctx)
    if system and not chat:
        problems.append("--system has no meaning without --chat; add --chat, or leave it out")
    with noting(problems):
        options = read_sampling(ctx, SamplingOptions)
    report(problems)
    model = at_domain(model, domain)
    prompts = [*prompt, *([_read_prompt(prompt_file)] if prompt_file else [])] or [""]
    from seedbed.checkpoint import load_model
    from seedbed.generate import check_prompts

    decoder, tokenizer = load_model(model, device)
    questions = [_question(tokenizer, model, text, system) for text in prompts] if chat else prompts
    check_prompts(decoder, tokenizer, questions, options)
    writer = _Writer(decoder, tokenizer, options, precision)
    if as_json or len(prompts) > 1:
        completions = writer.write(questions)
        if as_json:
            rows = [
                {"prompt": prompt, "text": c.text, "finish_reason": c.finish_reason}
                for prompt, c in zip(prompts, completions, strict=True)
            ]
            print_json({"model": model, "completions": rows})
            return
        between = "\n" if chat else ""
        click.echo("\n\n".join(f"{text}{between}{c.text}" for text, c in zip(prompts, completions, strict=True)))
        return
    if not chat:
        _hint_at_chat(model)
        click.echo(prompts[0], nl=False)
    writer.write(questions, shown=True)
    click.echo()


def _hint_at_chat(model: str) -> None:
    """Tell those who let a model continue text that was taught to answer."""
    if was_taught_to_answer(Path(model)):
        click.echo("This model was taught to answer; --chat asks it that way", err=True)


class _Writer:
    """A model laid out to write, with products as `--precision` has them."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, options: SamplingOptions, precision: str) -> None:
        from seedbed.device import autocast, pick_precision
        from seedbed.model.decoding import DecodingModel

        self._decoder, self._tokenizer, self._options = decoder, tokenizer, options
        device = decoder.embed_tokens.weight.device
        with autocast(device, pick_precision(precision, device)):
            self._decoding = DecodingModel(decoder)

    def write(self, prompts: Sequence[str | Sequence[int]], *, shown: bool = False) -> list[Completion]:
        """What follows the prompts; if `shown`, also printed as it is written."""
        from seedbed.generate import generate as write

        on_text = (lambda _, text: click.echo(text, nl=False)) if shown else None
        return write(self._decoder, self._tokenizer, prompts, self._options, on_text=on_text, decoding=self._decoding)


def _question(tokenizer: Tokenizer, model: str, text: str, system: str | None) -> list[int]:
    """A question as the model was taught to be asked."""
    messages = [{"role": "system", "content": system}] if system else []
    return _own_template(tokenizer, model).prompt_ids([*messages, {"role": "user", "content": text}])


def _own_template(tokenizer: Tokenizer, model: str) -> Template:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"--model {model} has no chat template, so it was not taught to answer; "
            "let it continue a text: seedbed generate"
        )
    return find_template(tokenizer, None, "chat")


@click.command(cls=Verb, epilog="Example: seedbed chat --model runs/answers --temperature 0.5")
@model_option
@domain_option
@click.option("--system", help="What the model is told before the conversation.")
@device_option
@precision_option
@sections(SamplingOptions)
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    model: str,
    domain: str | None,
    system: str | None,
    device: str,
    precision: str,
    **_flags: Any,
) -> None:
    """Talk to a model that was taught to answer; an empty line or Ctrl-D ends the conversation.

    The model sees the whole conversation at each turn. When that no longer fits its context, the oldest turns are
    dropped.
    """
    problems = wrong_flags(ctx)
    with noting(problems):
        options = read_sampling(ctx, SamplingOptions)
    report(problems)
    model = at_domain(model, domain)
    from seedbed.checkpoint import load_model

    decoder, tokenizer = load_model(model, device)
    template = _own_template(tokenizer, model)
    writer = _Writer(decoder, tokenizer, options, precision)
    told = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    while text := _next_line():
        turns.append({"role": "user", "content": text})
        prompt = template.prompt_ids([*told, *turns])
        while len(prompt) + options.max_new_tokens > decoder.config.max_seq_len and len(turns) > 1:
            turns = turns[2:]  # a question and its answer
            prompt = template.prompt_ids([*told, *turns])
        [answer] = writer.write([prompt], shown=True)
        turns.append({"role": "assistant", "content": answer.text})
        click.echo()


def _next_line() -> str:
    """What the user types, empty at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _read_prompt(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"--prompt_file {name}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt_file {name}: not a readable UTF-8 text file ({error})") from None
