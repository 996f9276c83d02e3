"""Verbs that show what the program sees: tokenizers, data, checkpoints."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.text import Text

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.options import given, sections
from seedbed.cli.verb import Verb, noting, refuse_unknown, report, wrong_flags
from seedbed.config import FLAGS, TRAINED_HERE, DataOptions, Layer, TextOptions, read_section, resolve
from seedbed.data.rows import NO_TARGET
from seedbed.disk import expanded
from seedbed.errors import CheckpointError

if TYPE_CHECKING:
    from seedbed.data import Row
    from seedbed.text.tokenizer import Tokenizer


@click.group()
def tokenizer() -> None:
    """Train a tokenizer, or inspect one."""


@tokenizer.command(
    "train",
    cls=Verb,
    short_help="Train a tokenizer on a text.",
    epilog="Example: seedbed tokenizer train --data book.txt --vocab_size 2000 --output tok",
)
@click.option(
    "--type", "kind", default="bpe", metavar="bpe|char", help="Byte-level BPE, or one token for each character. [bpe]"
)
@click.option(
    "--vocab_size", type=click.IntRange(min=1), help="Number of tokens; by default it grows with the text, up to 8000."
)
@click.option(
    "--output", type=expanded, required=True, metavar="FOLDER", help="Where to save it; a new or empty folder."
)
@json_option
@sections(TextOptions)
@click.pass_context
def train_tokenizer(
    ctx: click.Context, /, kind: str, vocab_size: int | None, output: str, as_json: bool, **_flags: Any
) -> None:
    """Train a tokenizer on the training documents; documents held out for validation are not used."""
    problems = wrong_flags(ctx)
    with noting(problems):
        options = read_section(TextOptions, given(ctx, TextOptions.model_fields), FLAGS)
    if kind not in TRAINED_HERE:
        problems.append(f"--type {kind}: expected bpe or char")
    if kind == "char" and vocab_size:
        problems.append("--vocab_size has no meaning with --type char: there is a token for each character")
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        problems.append(f"--output {output} is there already and not an empty folder; choose another")
    report(problems)
    from seedbed.model.hub import new_folder
    from seedbed.text.tokenizer import bytes_per_token
    from seedbed.train.corpus import open_texts
    from seedbed.train.corpus import train_tokenizer as train
    from seedbed.train.progress import Display

    texts = open_texts(options)
    trained = train(kind, vocab_size, texts, Display(make_console(as_json), log_every=1))
    with new_folder(Path(output)) as folder:
        trained.save(folder)
    held_out = bytes_per_token(trained, texts.held_out_documents()) if texts.hold_out else None
    facts = {"tokenizer": output, "type": kind, "vocab_size": trained.vocab_size, "bytes_per_token": held_out}
    if as_json:
        print_json(facts)
        return
    measured = "not measured (nothing held out)" if held_out is None else f"{held_out:.3f} on held-out text"
    print_facts({"Saved to": output, "Vocabulary": f"{trained.vocab_size:,} tokens", "Bytes per token": measured})


@tokenizer.command("show", cls=Verb, epilog="Example: seedbed tokenizer show tok --text 'How is this cut?'")
@click.argument("folder")
@click.option("--text", help="Show how this text is cut into tokens.")
@click.option("--data", help="Measure bytes per token on this text.")
@json_option
@click.pass_context
def show_tokenizer(ctx: click.Context, folder: str, text: str | None, data: str | None, as_json: bool) -> None:
    """Show a tokenizer's size and special tokens, and how it cuts a text."""
    refuse_unknown(ctx)
    from seedbed.data import open_whole
    from seedbed.text.tokenizer import Tokenizer, bytes_per_token

    loaded = Tokenizer.load(folder)
    facts: dict[str, Any] = {
        "tokenizer": folder,
        "vocab_size": loaded.vocab_size,
        "eos_id": loaded.eos_id,
        "bos_id": loaded.bos_id,
        "bytes_per_token": bytes_per_token(loaded, open_whole(data).documents()) if data else None,
    }
    if text is not None:
        ids = loaded.encode(text)
        facts["tokens"] = [{"id": token, "text": loaded.decode([token])} for token in ids]
    if as_json:
        print_json(facts)
        return
    eos = loaded.decode([loaded.eos_id])
    shown: dict[str, object] = {
        "Vocabulary": f"{loaded.vocab_size:,} tokens",
        "End of text": f"{eos} ({loaded.eos_id})",
    }
    if data:
        shown["Bytes per token"] = f"{facts['bytes_per_token']:.3f} on {data}"
    print_facts(shown)
    if text is not None:
        click.echo(" ".join(f"{token['text']!r}:{token['id']}" for token in facts["tokens"]))


@click.group()
def data() -> None:
    """List named sources; show what a model will see of your data."""


@data.command("list", cls=Verb)
@json_option
@click.pass_context
def list_data(ctx: click.Context, /, as_json: bool) -> None:
    """List the sources that --data knows by name."""
    refuse_unknown(ctx)
    from seedbed.data.named import NAMED

    rows = [
        {"name": name, "splits": list(source.splits), "size": source.size, "about": source.about}
        for name, source in NAMED.items()
    ]
    if as_json:
        print_json({"sources": rows})
        return
    for row in rows:
        click.echo(f"{row['name']:<14}{row['size']:>7}  {', '.join(row['splits']):<26}  {row['about']}")


@data.command(
    "show",
    cls=Verb,
    short_help="Show rows of your data as a model will see them.",
    epilog="Example: seedbed data show --data book.txt --tokenizer tok --max_seq_len 64",
)
@click.option("--num", type=click.IntRange(min=1), default=3, help="How many rows to show. [3]")
@click.option(
    "--model", type=expanded, metavar="FOLDER", help="A pretrained model whose tokenizer and chat template to use."
)
@json_option
@sections(DataOptions, without=("streaming",))
@click.pass_context
def show_data(ctx: click.Context, /, num: int, model: str | None, as_json: bool, **_flags: Any) -> None:
    """Show the first rows of the first epoch, exactly as a model will see them.

    What is learnt is green, what is only context is dimmed, and a bar marks where a document begins: nothing to its
    right sees anything to its left.
    """
    problems = wrong_flags(ctx)
    with noting(problems):
        config = resolve("scratch", [Layer(FLAGS, given(ctx, DataOptions.model_fields))])
    if model is not None and ctx.params["tokenizer"] is not None:
        problems.append("--tokenizer and --model both name a tokenizer; leave one of them out")
    report(problems)
    from seedbed.train.corpus import make_tokenizer, open_training_texts, tokenize
    from seedbed.train.finetune import base_folder
    from seedbed.train.ingredients import reading_of
    from seedbed.train.progress import Display

    if model is not None:
        config = config.update(f"model {model}", tokenizer=str(base_folder(model)))
    options = config.data
    console = make_console(as_json)
    display = Display(console, log_every=1)
    texts = open_training_texts(options)
    reading = reading_of(config, texts, make_tokenizer(options, texts, display))
    corpus = tokenize(texts, reading, options, config.training, display)
    held_out = corpus.validation.num_documents if corpus.validation else 0
    rows = [corpus.rows.row(0, index) for index in range(min(num, len(corpus.rows)))]
    if as_json:
        print_json(
            {
                "documents": corpus.num_documents,
                "validation_documents": held_out,
                "rows": len(corpus.rows),
                "tokens": corpus.rows.num_targets,
                "examples": [_row_json(row, reading.tokenizer) for row in rows],
            }
        )
        return
    console.print(
        f"{corpus.num_documents:,} training documents, {held_out:,} held out; {len(corpus.rows):,} rows of "
        f"{options.max_seq_len} tokens, {corpus.rows.num_targets:,} predicted an epoch",
        highlight=False,
    )
    for number, row in enumerate(rows):
        _print_row(number, row, reading.tokenizer, console)


def _row_json(row: Row, loaded: Tokenizer) -> dict[str, Any]:
    return {
        "input_ids": row.input_ids.tolist(),
        "labels": row.labels.tolist(),
        "segment_ids": row.segment_ids.tolist(),
        "text": loaded.decode(row.input_ids.tolist()),
        "learnt": loaded.decode(row.labels[row.labels != NO_TARGET].tolist()),
    }


def _print_row(number: int, row: Row, loaded: Tokenizer, console: Console) -> None:
    """Each token by its own fate: whether it was predicted from the one before it.

    Runs of tokens with one fate are decoded together, so that characters of several tokens stay whole.
    """
    predicted = int((row.labels != NO_TARGET).sum())
    console.print(f"\nRow {number}: {predicted} of {len(row.labels)} tokens predicted", style="bold", highlight=False)
    first = np.append(row.position_ids[:1] == 0, row.segment_ids[1:] != row.segment_ids[:-1])
    length = int(np.flatnonzero(row.labels != NO_TARGET)[-1]) + 1
    tokens: list[tuple[int, str, bool]] = []  # id, fate, whether a document begins before it
    for place in range(length):
        if first[place]:
            tokens.append((int(row.input_ids[place]), "dim", True))
        label = int(row.labels[place])
        follows = place + 1 < length and not first[place + 1]
        if label != NO_TARGET:
            tokens.append((label, "green", False))
        elif follows:
            tokens.append((int(row.input_ids[place + 1]), "dim", False))
    text = Text()
    for (style, begins), run in groupby(tokens, key=lambda token: token[1:]):
        if begins:
            text.append("▌", style="bold cyan")
        text.append(loaded.decode([token for token, _, _ in run]), style=style)
    console.print(text, soft_wrap=True, highlight=False)


@click.command(cls=Verb, epilog="Example: seedbed verify runs/demo/checkpoints/best")
@click.argument("folder")
@json_option
@click.pass_context
def verify(ctx: click.Context, folder: str, as_json: bool) -> None:
    """Check every byte of a checkpoint, or of all those of a run, against its manifest."""
    refuse_unknown(ctx)
    from seedbed.checkpoint import checkpoints_of, damage, find_model

    path = find_model(folder, "verify")
    found = {checkpoint: damage(checkpoint) for checkpoint in checkpoints_of(Path(folder)) or [path]}
    damaged = {checkpoint: problems for checkpoint, problems in found.items() if problems}
    if as_json:
        problems = [problem if len(found) == 1 else f"{of.name}/{problem}" for of in damaged for problem in damaged[of]]
        print_json({"checkpoint": str(path), "intact": not damaged, "problems": problems})
    if damaged:
        raise CheckpointError("\n".join(f"{of} is damaged: {'; '.join(what)}" for of, what in damaged.items()))
    if not as_json:
        click.echo("\n".join(f"{checkpoint} is intact" for checkpoint in found))
