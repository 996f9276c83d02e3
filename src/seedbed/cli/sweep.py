"""Many runs from one file."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from seedbed.cli.console import json_option, make_console, print_json
from seedbed.cli.verb import Verb, refuse_unknown


@click.command(
    cls=Verb,
    epilog="Example: seedbed sweep examples/sweeps/quick.yaml. The same command again resumes an unfinished sweep.",
)
@click.argument("file", metavar="FILE.yaml")
@click.option("--output", metavar="FOLDER", help="The sweep's folder. [runs/ and the name of the file]")
@click.option(
    "--at_once",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many runs to train at once. [one for each GPU; one on a CPU]",
)
@click.option("--dry_run", is_flag=True, help="Check the file and list the runs, without training.")
@json_option
@click.pass_context
def sweep(
    ctx: click.Context, /, file: str, output: str | None, at_once: int | None, dry_run: bool, as_json: bool
) -> int:
    """Train the runs that a file describes: every combination of a grid, named runs, each with several seeds.

    Each run is a process of its own, with a folder inside the sweep's. At the end there is a table, sorted by
    validation loss, and a page that compares the runs.
    """
    refuse_unknown(ctx)
    if dry_run:
        _show_plan(file, output, as_json)
        return 0
    from seedbed.sweep import run_sweep

    result = run_sweep(file, output, at_once, make_console(as_json))
    if as_json:
        print_json(result.to_json())
    return result.exit_code


def _show_plan(file: str, output: str | None, as_json: bool) -> None:
    """The runs of a file: what varies between them, and the command of each for programs."""
    from seedbed.sweep.plan import as_flags, changes, make_plan
    from seedbed.sweep.run import folder_of

    folder = folder_of(file, output)
    plan = make_plan(Path(file), folder)
    remarks = changes(plan, folder)
    if as_json:
        runs = [
            {"name": run.name, "parent": run.parent, "command": ["seedbed", *run.words(plan.verb, folder / run.name)]}
            for run in plan.runs.values()
        ]
        print_json({"sweep": str(folder), "runs": runs})
        return
    varying = plan.varying()
    shared = {name: value for run in plan.runs.values() for name, value in run.flags.items() if name not in varying}
    click.echo(f"{len(plan.runs)} runs in {folder}: seedbed {plan.verb} {shlex.join(as_flags(shared))} and")
    width = max(map(len, plan.runs))
    for run in plan.runs.values():
        own = {name: value for name, value in run.flags.items() if name in varying}
        click.echo(f"  {run.name:<{width}}  {shlex.join(as_flags(own))}")
    if plan.halving:
        rungs = ", ".join(map(str, plan.halving.rungs))
        click.echo(f"At step {rungs} the best {plan.halving.keep:.0%} go on")
    for remark in remarks:
        click.echo(remark)
