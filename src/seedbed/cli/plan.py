"""What a run would take, before it starts."""

from __future__ import annotations

from typing import Any

import click

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.options import config_option, from_option, resolved, sections
from seedbed.cli.training import CONTINUING, FINETUNING
from seedbed.cli.verb import Verb
from seedbed.config import REGIMES, TRAINED_HERE

memory_limit_option = click.option(
    "--memory_limit", metavar="SIZE", help="Find the largest batch that fits into this much memory, such as 8GB."
)


@click.group()
def plan() -> None:
    """What a run will cost and what may go wrong, before it starts."""


@plan.command(
    "pretrain",
    cls=Verb,
    short_help="The cost of training a model from scratch.",
    epilog="Example: seedbed plan pretrain --model gpt2-medium --memory_limit 16GB",
)
@config_option
@from_option
@json_option
@memory_limit_option
@sections(*REGIMES["scratch"].sections)
@click.pass_context
def plan_pretrain(ctx: click.Context, /, as_json: bool, memory_limit: str | None, **_flags: Any) -> int:
    """Memory, speed and disk that training a model would need; with --data, also the time and what may go wrong.

    With --strict, a warning makes the exit code 2.
    """
    return _plan("scratch", ctx, as_json, memory_limit)


@plan.command(
    "finetune",
    cls=Verb,
    short_help="The cost of fine-tuning, and what is in the data.",
    epilog="Example: seedbed plan finetune --model gpt2-medium --lora --lora_r 16 --lora_targets all-linear,head",
)
@config_option
@from_option
@json_option
@memory_limit_option
@sections(*REGIMES["finetune"].sections, regimes=FINETUNING)
@click.pass_context
def plan_finetune(ctx: click.Context, /, as_json: bool, memory_limit: str | None, **_flags: Any) -> int:
    """What would be trained, what it costs and what may go wrong; with --data, what is in the data. Reads no weights.

    With --strict, a warning makes the exit code 2.
    """
    return _plan("finetune", ctx, as_json, memory_limit)


@plan.command(
    "continue",
    cls=Verb,
    short_help="The cost of teaching a model another domain.",
    epilog="Example: seedbed plan continue --model runs/book --data law.txt --domain law",
)
@config_option
@from_option
@json_option
@memory_limit_option
@sections(*REGIMES["continue"].sections, regimes=CONTINUING)
@click.pass_context
def plan_continue(ctx: click.Context, /, as_json: bool, memory_limit: str | None, **_flags: Any) -> int:
    """What another domain would cost and what may go wrong. Counts the new text alone, without replay."""
    return _plan("continue", ctx, as_json, memory_limit)


def _plan(regime: str, ctx: click.Context, as_json: bool, memory_limit: str | None) -> int:
    from seedbed.train.plan import plan_run
    from seedbed.train.progress import Display

    config = resolved(ctx, regime)
    display = Display(make_console(as_json), config.watching.log_every)
    facts = plan_run(config, display, memory_limit)
    if as_json:
        print_json(facts)
    else:
        assumed = regime == "scratch" and config.data.data is None and config.data.vocab_size is None
        _print_plan(facts, assumed and config.data.tokenizer in TRAINED_HERE)
    fatal = ("error", "warning") if config.watching.strict else ("error",)
    return 2 if any(finding["level"] in fatal for finding in facts["findings"]) else 0


def _print_ways(processes: int, ways: dict[str, Any]) -> None:
    click.echo(f"\nOne of {processes:,} processes")
    for name, way in ways.items():
        speeds = ", ".join(f"{share:.0%} with {link}" for link, share in way["efficiency"].items())
        click.echo(f"  {name}: {way['memory_mb']:,.0f} MB, sends {way['communication_mb']:,.0f} MB a step")
        click.echo(f"        keeps of its speed: {speeds}")


def _print_plan(facts: dict[str, Any], vocabulary_assumed: bool) -> None:
    from seedbed.train.progress import clock

    parameters, trainable, memory = facts["parameters"], facts["trainable_parameters"], facts["memory_mb"]
    print_facts(
        {
            "Parameters": f"{parameters:,}",
            "Trainable": f"{trainable:,}" + (f" ({trainable / parameters:.2%})" if trainable != parameters else ""),
            "Weights": f"{facts['parameters_mb']:,.1f} MB in float32",
            "Vocabulary": f"{facts['vocab_size']:,}{' (assumed; see --vocab_size)' if vocabulary_assumed else ''}",
            "Device": f"{facts['device']}, {facts['precision']}",
        }
    )
    click.echo("\nMemory (MB)")
    print_facts({f"  {name.capitalize()}": f"{size:10,.0f}" for name, size in memory.items()})
    click.echo()
    rows: dict[str, object] = {
        "A step": f"{facts['step_seconds']:.3g} s, {facts['tokens_per_second']:,.0f} tokens/s",
        "Checkpoints": f"{facts['disk_mb']:,.0f} MB on disk",
    }
    if facts["tokens"] is not None:
        rows["Tokens learnt an epoch"] = f"{facts['tokens']:,}"
        rows["Steps an epoch"] = f"{facts['steps_per_epoch']:,}"
        rows["Steps"] = "until the hours run out" if facts["steps"] is None else f"{facts['steps']:,}"
        rows["Time to the first result"] = clock(facts["first_result_hours"])
        rows["Time to the end"] = clock(facts["hours"])
    if facts["flops"] is not None:
        rows["Arithmetic"] = f"{facts['flops']:.3g} FLOPs"
    print_facts(rows)
    if "parallel" in facts:
        _print_ways(facts["processes"], facts["parallel"])
    if "fitting" in facts:
        click.echo(f"\n{facts['fitting']}")
    for finding in facts["findings"]:
        level = finding["level"].capitalize()
        click.echo(f"\n{level} ({finding['name']}): {finding['message']}. {finding['remedy']}")
