"""Verbs that take models from other programs, and make them for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.verb import Verb, refuse_unknown
from seedbed.errors import ConfigError

if TYPE_CHECKING:
    from seedbed.train.progress import Display

DTYPES = ("float32", "bfloat16", "float16")


@click.command("import", cls=Verb, epilog="Example: seedbed import SmolLM2-135M-Instruct.Q4_1.gguf --output smollm2")
@click.argument("source")
@click.argument("folder", required=False)
@click.option("--output", metavar="FOLDER", help="Where to write it, unless FOLDER says so; a new or empty folder.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the weights written. [float32 from GGUF; from the hub, as they are stored]",
)
@json_option
@click.pass_context
def import_model(
    ctx: click.Context,
    /,
    source: str,
    folder: str | None,
    output: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Convert SOURCE to a model folder: a .gguf file, or a model on the hub (gpt2, owner/name).

    Every --model accepts the folder, and transformers opens it. Quantized weights become plain ones of 4 bytes each (2
    with --dtype bfloat16); what quantization lost stays lost. Families: GPT-2, Llama (and what a GGUF file calls
    llama: Mistral, TinyLlama, SmolLM), Qwen2, Qwen3. From the hub only safetensors are downloaded, never pickled
    weights.
    """
    refuse_unknown(ctx)
    from seedbed.model.hub import require_new
    from seedbed.train.progress import Display

    output = _one_of("--output", output, folder)
    require_new(Path(output))
    display = Display(make_console(as_json), log_every=1)
    convert = _import_gguf if source.lower().endswith(".gguf") else _import_folder
    facts = {"source": source, **convert(source, Path(output), dtype, display), "output": output}
    if as_json:
        print_json(facts)
        return
    print_facts(
        {
            "Parameters": f"{facts['parameters']:,}",
            "Family": facts["family"],
            "Vocabulary": f"{facts['vocab_size']:,} tokens",
            "Weights of the source": ", ".join(f"{kind} {n:,}" for kind, n in facts["quantization"].items()),
            "Saved to": f"{output} ({facts['dtype']})",
        }
    )


def _import_gguf(source: str, output: Path, dtype: str | None, display: Display) -> dict[str, Any]:
    import torch

    from seedbed.model.gguf import import_gguf, read_gguf

    dtype = dtype or "float32"
    with display.working(f"Reading {source}"):
        file = read_gguf(Path(source))
    with display.counting("Writing") as report:
        made = import_gguf(file, output, getattr(torch, dtype), report)
    return {
        "parameters": made.num_parameters,
        "family": made.config.family,
        "vocab_size": made.config.vocab_size,
        "quantization": made.quantization,
        "dtype": dtype,
    }


def _import_folder(source: str, output: Path, dtype: str | None, display: Display) -> dict[str, Any]:
    import torch

    from seedbed.model.decoder import num_parameters
    from seedbed.model.families import read_config
    from seedbed.model.hub import copy_pretrained, find_pretrained, stored_types

    folder = find_pretrained(source, "SOURCE")
    config = read_config(folder)
    with display.counting("Copying") as report:
        copy_pretrained(folder, output, None if dtype is None else getattr(torch, dtype), report)
    types = stored_types(folder)
    return {
        "parameters": num_parameters(config),
        "family": config.family,
        "vocab_size": config.vocab_size,
        "quantization": types,
        "dtype": dtype or ", ".join(types),
    }


@click.command(cls=Verb, epilog="Example: seedbed export --model runs/questions-gpt2-lora --merge --output merged")
@click.argument("folder", required=False)
@click.option("--model", metavar="FOLDER", help="An adapter's checkpoint, or a run that trained one.")
@click.option("--merge", is_flag=True, help="Merge the adapter into its base: a plain model folder.")
@click.option("--output", required=True, metavar="FOLDER", help="Where to write it; a new or empty folder.")
@json_option
@click.pass_context
def export(
    ctx: click.Context, /, folder: str | None, model: str | None, merge: bool, output: str, as_json: bool
) -> None:
    """Make a model for other programs of what was trained.

    The merged weights are read back from the disk and must give the adapter's logits, or nothing is written.
    """
    refuse_unknown(ctx)
    model = _one_of("--model", model, folder)
    if not merge:
        raise ConfigError("export needs to know what to make: --merge (a plain model of an adapter and its base)")
    from seedbed.export import export_merged
    from seedbed.train.progress import Display

    with Display(make_console(as_json), log_every=1).working(f"Merging {model}"):
        facts = export_merged(model, Path(output))
    if as_json:
        print_json(facts)
        return
    print_facts(
        {
            "Saved to": facts["output"],
            "Base": facts["base"],
            "Parameters": f"{facts['parameters']:,}",
            "Logits": f"differ by {facts['max_difference']:.1e} of the largest ({facts['tolerance']:.0e} allowed)",
        }
    )


def _one_of(flag: str, given: str | None, word: str | None) -> str:
    """A value that may follow its flag or stand alone."""
    if given and word:
        raise ConfigError(f"{flag} {given} and {word} name the same thing twice; leave one of them out")
    if not (value := given or word):
        raise ConfigError(f"{flag} is missing: name a folder")
    return value
