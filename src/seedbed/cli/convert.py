"""Verbs that take models from other programs, and make them for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.verb import Verb, refuse_unknown
from seedbed.disk import expanded
from seedbed.errors import ConfigError

if TYPE_CHECKING:
    from seedbed.train.progress import Display

DTYPES = ("float32", "bfloat16", "float16")


@click.command("import", cls=Verb, epilog="Example: seedbed import SmolLM2-135M-Instruct.Q4_1.gguf --output smollm2")
@click.argument("source")
@click.argument("folder", required=False)
@click.option(
    "--output",
    type=expanded,
    metavar="FOLDER",
    help="Where to write it, unless FOLDER says so; a new or empty folder.",
)
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


@click.command(
    cls=Verb, epilog="Example: seedbed export --model runs/questions-gpt2-lora --gguf --output questions.gguf"
)
@click.argument("folder", required=False)
@click.option(
    "--model", type=expanded, metavar="FOLDER", help="A checkpoint, a run, an adapter or a transformers folder."
)
@click.option("--merge", is_flag=True, help="Merge the adapter into its base: a plain model folder.")
@click.option("--gguf", is_flag=True, help="Write a GGUF file, for llama.cpp and its kin; an adapter is merged.")
@click.option(
    "--output",
    type=expanded,
    required=True,
    metavar="PATH",
    help="Where to write it; a new folder, or a new .gguf file.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="With --gguf: of the matrices. [float16]")
@json_option
@click.pass_context
def export(
    ctx: click.Context,
    /,
    folder: str | None,
    model: str | None,
    merge: bool,
    gguf: bool,
    output: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Make a model for other programs of what was trained: --merge, or --gguf.

    Merged weights must give the adapter's logits, or nothing is written. A GGUF file has the tokenizer and the
    chat template in it.
    """
    refuse_unknown(ctx)
    from seedbed.train.progress import Display

    model = _one_of("--model", model, folder)
    if merge == gguf:
        raise ConfigError(
            "export needs to know what to make: --merge (a plain model of an adapter and its base) or --gguf (a file "
            "for llama.cpp), one of the two"
        )
    if merge and dtype:
        raise ConfigError(f"--dtype {dtype} goes with --gguf; a merged model is float32, and seedbed import changes it")
    display = Display(make_console(as_json), log_every=1)
    facts = _export_gguf(model, Path(output), dtype or "float16", display) if gguf else _merge(model, output, display)
    if as_json:
        print_json(facts)
        return
    made = {
        "Saved to": facts["output"] + (f" ({facts['dtype']}, {facts['size'] / 1e6:,.1f} MB)" if gguf else ""),
        "Parameters": f"{facts['parameters']:,}",
    }
    if gguf:
        print_facts(made | {"Family": facts["family"]})
        return
    logits = f"differ by {facts['max_difference']:.1e} of the largest ({facts['tolerance']:.0e} allowed)"
    print_facts(made | {"Base": facts["base"], "Logits": logits})


def _merge(model: str, output: str, display: Display) -> dict[str, Any]:
    from seedbed.export import export_merged

    with display.working(f"Merging {model}"):
        return export_merged(model, Path(output))


def _export_gguf(model: str, output: Path, dtype: str, display: Display) -> dict[str, Any]:
    import torch

    from seedbed.export import export_model_as_gguf

    with display.counting("Writing") as report:
        return export_model_as_gguf(model, output, getattr(torch, dtype), report)


def _one_of(flag: str, given: str | None, word: str | None) -> str:
    """A value that may follow its flag or stand alone."""
    if given and word:
        raise ConfigError(f"{flag} {given} and {word} name the same thing twice; leave one of them out")
    if not (value := given or word):
        raise ConfigError(f"{flag} is missing: name a folder")
    return value
