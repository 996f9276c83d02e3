"""What a run would take, before it starts."""

from __future__ import annotations

from typing import Any

import click

from seedbed.cli.console import json_option, make_console, print_facts, print_json
from seedbed.cli.options import Verb, layers, sections
from seedbed.cli.training import CONTINUING, FINETUNING, config_option
from seedbed.config import REGIME_SECTIONS, TRAINED_HERE, option_names, resolve


@click.group()
def plan() -> None:
    """What a run would take, before it starts."""


@plan.command("pretrain", cls=Verb, epilog="Example: seedbed plan pretrain --model gpt2-medium")
@config_option
@json_option
@sections(*REGIME_SECTIONS["scratch"])
@click.pass_context
def plan_pretrain(ctx: click.Context, /, config: str | None, as_json: bool, **_flags: Any) -> None:
    """The parameters of a model and the memory that they take; needs no data and no weights."""
    from seedbed.train.plan import plan_pretraining

    resolved = resolve("scratch", layers(ctx, option_names("scratch"), config))
    facts = plan_pretraining(resolved)
    assumed = resolved.data.vocab_size is None and resolved.data.tokenizer in TRAINED_HERE
    _print_plan(facts, as_json, " (assumed; see --vocab_size)" if assumed else "")


@plan.command(
    "finetune",
    cls=Verb,
    epilog="Example: seedbed plan finetune --model gpt2-medium --lora --lora_r 16 --lora_targets all-linear,head",
)
@config_option
@json_option
@sections(*REGIME_SECTIONS["finetune"], regimes=FINETUNING)
@click.pass_context
def plan_finetune(ctx: click.Context, /, config: str | None, as_json: bool, **_flags: Any) -> int:
    """What would be trained and what may go wrong; with --data, what is in the data. Reads no weights.

    With --strict the exit code is 2 when there is a warning.
    """
    return _plan_adapting("finetune", ctx, config, as_json)


@plan.command(
    "continue", cls=Verb, epilog="Example: seedbed plan continue --model runs/book --data law.txt --domain law"
)
@config_option
@json_option
@sections(*REGIME_SECTIONS["continue"], regimes=CONTINUING)
@click.pass_context
def plan_continue(ctx: click.Context, /, config: str | None, as_json: bool, **_flags: Any) -> int:
    """What would be trained and what may go wrong with a domain added; of the new text alone, without replay."""
    return _plan_adapting("continue", ctx, config, as_json)


def _plan_adapting(regime: str, ctx: click.Context, config: str | None, as_json: bool) -> int:
    from seedbed.train.plan import plan_finetuning
    from seedbed.train.progress import Display

    resolved = resolve(regime, layers(ctx, option_names(regime), config))
    display = Display(make_console(as_json), resolved.watching.log_every)
    facts = plan_finetuning(resolved, display)
    _print_plan(facts, as_json)
    fatal = ("error", "warning") if resolved.watching.strict else ("error",)
    return 2 if any(finding["level"] in fatal for finding in facts["findings"]) else 0


def _print_plan(facts: dict[str, Any], as_json: bool, vocabulary_remark: str = "") -> None:
    if as_json:
        print_json(facts)
        return
    parameters, trainable = facts["parameters"], facts["trainable_parameters"]
    rows: dict[str, object] = {
        "Parameters": f"{parameters:,}",
        "Trainable": f"{trainable:,} ({trainable / parameters:.2%})" if trainable != parameters else f"{trainable:,}",
        "Weights": f"{facts['parameters_mb']:,.1f} MB in float32",
        "Vocabulary": f"{facts['vocab_size']:,}{vocabulary_remark}",
    }
    if "steps" in facts:
        rows["Tokens learnt an epoch"] = f"{facts['tokens']:,}"
        rows["Steps an epoch"] = f"{facts['steps_per_epoch']:,}"
        rows["Steps"] = "until the hours run out" if facts["steps"] is None else f"{facts['steps']:,}"
    print_facts(rows)
    for finding in facts.get("findings", []):
        level = finding["level"].capitalize()
        click.echo(f"\n{level} ({finding['name']}): {finding['message']}. {finding['remedy']}")
