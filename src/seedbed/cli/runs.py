"""Verbs that look into run folders. None of them needs torch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from seedbed.cli.console import json_option, print_json
from seedbed.cli.verb import Verb, refuse_unknown
from seedbed.disk import expanded
from seedbed.errors import ConfigError, did_you_mean
from seedbed.runs.folder import read_summary, update_summary
from seedbed.runs.info import RunInfo, find_runs, is_run, read_run, run_of

RUNS = Path("runs")
"""Where runs are looked for when nobody says where."""
UNCUT = 100
"""Width of a comparison that is not printed in a terminal."""


@click.group()
def runs() -> None:
    """List, show, compare and annotate runs; write report pages."""


@runs.command(
    "list",
    cls=Verb,
    short_help="List runs as a table.",
    epilog="Examples: seedbed runs list --sort val_loss --filter 'status=done' --filter 'lr<1e-4'; "
    "seedbed runs list runs/sweep --columns name,lr,val_loss --format markdown",
)
@click.argument("folders", metavar="[FOLDER ...]", nargs=-1)
@click.option("--columns", metavar="NAME,...", help="Columns to show, or `all`; docs/runs.md explains each.")
@click.option("--sort", metavar="NAME", help="Sort by a column or an option; -NAME puts the highest first.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="'NAME<VALUE'",
    help="Only runs where this holds of a column or an option: = != < <= > >=, or ~ for contains. May be repeated.",
)
@click.option(
    "--format", "form", type=click.Choice(["table", "markdown", "csv"]), default="table", help="How to print. [table]"
)
@json_option
@click.pass_context
def list_runs(
    ctx: click.Context,
    /,
    folders: tuple[str, ...],
    columns: str | None,
    sort: str | None,
    filters: tuple[str, ...],
    form: Any,
    as_json: bool,
) -> None:
    """List the runs in and below the folders (by default runs/) as a table."""
    from seedbed.runs.columns import SHOWN_BY_DEFAULT, check_columns
    from seedbed.runs.query import select
    from seedbed.runs.table import load_runs, render, table

    _refuse_flags_among(ctx, folders)
    chosen = check_columns([name.strip() for name in columns.split(",")]) if columns else None
    found = load_runs(_folders(folders))
    selected = select(found, filters, sort)
    if as_json:
        rows = table(selected, chosen)
        paths = [str(run.path) for run in selected]
        print_json({"runs": [{**row, "path": path} for row, path in zip(rows, paths, strict=True)]})
        return
    if not selected:
        click.echo(_nothing_found(folders, len(found)), err=form != "table")
        return
    rows = table(selected, chosen or SHOWN_BY_DEFAULT)
    width = shutil.get_terminal_size().columns if form == "table" and sys.stdout.isatty() else None
    click.echo(render(rows, chosen, form, width))
    if chosen is None and width is not None:
        _say_what_is_left_out(rows, width)


def _folders(names: Sequence[str]) -> list[Path]:
    if missing := [name for name in names if not Path(name).is_dir()]:
        raise ConfigError([f"{name}: no such folder; expected one with runs in it" for name in missing])
    return [Path(name) for name in names] or [RUNS]


def _nothing_found(folders: Sequence[str], found: int) -> str:
    where = ", ".join(str(Path(name).absolute()) for name in folders or [str(RUNS)])
    if found:
        return f"None of the {found} runs in {where} meets every --filter."
    return f"No runs in {where} or below. Train one: seedbed pretrain --data book.txt --model tiny"


def _say_what_is_left_out(rows: Sequence[dict[str, Any]], width: int) -> None:
    from seedbed.runs.table import default_columns

    shown = default_columns(rows, width)
    if left := [name for name in default_columns(rows) if name not in shown]:
        click.echo(f"Not shown for want of room: {', '.join(left)} (--columns chooses, --columns all shows everything)")


@runs.command("show", cls=Verb, epilog="Example: seedbed runs show runs/law --lineage --baseline runs/law-naive")
@click.argument("folder", metavar="RUN")
@click.option("--lineage", is_flag=True, help="Show the domains its model learnt, and what each made it forget.")
@click.option(
    "--baseline",
    type=expanded,
    metavar="RUN",
    help="With --lineage, compare with this naive run of the same domain from the same model.",
)
@json_option
@click.pass_context
def show_run(ctx: click.Context, /, folder: str, lineage: bool, baseline: str | None, as_json: bool) -> None:
    """Show one run in full, or the history of its model. RUN is a run folder or one of its checkpoints."""
    refuse_unknown(ctx)
    if baseline and not lineage:
        raise ConfigError("--baseline has no meaning without --lineage; add --lineage, or leave it out")
    path = _existing(folder)
    run = _around(path)
    if lineage:
        from seedbed.cli.lineage import print_lineage

        naive = _existing(baseline, "--baseline") if baseline else None
        print_lineage(path, run, read_summary(run), naive, as_json=as_json)
        return
    from seedbed.cli.summary import run_as_json, run_lines

    info = _all_of(run)
    if as_json:
        print_json(run_as_json(info))
        return
    for line in run_lines(info):
        click.echo(line)


@runs.command(
    "note",
    cls=Verb,
    short_help="Write a note on a run.",
    epilog='Example: seedbed runs note runs/book "twice the context, same loss"',
)
@click.argument("name", metavar="RUN")
@click.argument("text")
@click.pass_context
def note(ctx: click.Context, /, name: str, text: str) -> None:
    """Write a note on a run; it replaces the one before, and an empty text removes it."""
    refuse_unknown(ctx)
    run = _run(name).path
    update_summary(run, notes=text)
    click.echo(f"{run}: {'noted' if text else 'has no note now'}")


@runs.command(
    "compare",
    cls=Verb,
    short_help="Compare runs: options, results, curves, answers.",
    epilog="Example: seedbed runs compare runs/base runs/lora --axis time --report comparison.html",
)
@click.argument("names", metavar="RUN RUN [...]", nargs=-1)
@click.option(
    "--axis",
    type=click.Choice(["step", "tokens", "time", "epoch"]),
    default="tokens",
    help="What to align the curves by. [tokens]",
)
@click.option("--markdown", is_flag=True, help="Print as Markdown.")
@click.option("--report", metavar="FILE.html", help="Also write a page with curves.")
@json_option
@click.pass_context
def compare_runs(
    ctx: click.Context, /, names: tuple[str, ...], axis: Any, markdown: bool, report: str | None, as_json: bool
) -> None:
    """Show what differs between runs, whether it is more than luck, and their answers side by side."""
    _refuse_flags_among(ctx, names)
    found = {run.path.resolve(): run for run in map(_run, names)}
    if len(found) < 2:
        raise ConfigError("runs compare: expected two or more different runs, such as runs/one runs/two")
    if markdown and as_json:
        raise ConfigError("--markdown contradicts --json; leave one of them out")
    from seedbed.cli.comparison import markdown_lines, text_lines
    from seedbed.runs.compare import compare

    comparison = compare(list(found.values()), axis)
    if as_json:
        print_json(asdict(comparison))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNCUT
        for line in markdown_lines(comparison) if markdown else text_lines(comparison, width):
            click.echo(line)
    if report:
        click.echo(_write_report([run.path for run in found.values()], report), err=as_json)


@runs.command(
    "report",
    cls=Verb,
    short_help="Write a page with curves and diagnosis.",
    epilog="Example: seedbed runs report runs/base runs/lora --output comparison.html",
)
@click.argument("names", metavar="RUN [...]", nargs=-1, required=True)
@click.option(
    "--output",
    type=expanded,
    metavar="FILE.html",
    help="Where to write the page. [report.html in the run; for several, comparison.html beside them]",
)
@json_option
@click.pass_context
def report_runs(ctx: click.Context, /, names: tuple[str, ...], output: str | None, as_json: bool) -> None:
    """Write a page with curves, events, samples and diagnosis of one run or several. It opens offline."""
    _refuse_flags_among(ctx, names)
    page = _write_report([_run(name).path for name in names], output)
    if as_json:
        print_json({"page": str(page)})
    else:
        click.echo(page)


def _write_report(paths: Sequence[Path], output: str | None) -> Path:
    from seedbed.runs.report import write_report

    return write_report(paths, Path(output) if output else None)


def _refuse_flags_among(ctx: click.Context, words: Sequence[str]) -> None:
    """Refuse unknown flags; a verb that takes many arguments finds them among these."""
    ctx.args.extend(word for word in words if word.startswith("-"))
    refuse_unknown(ctx)


def _run(name: str) -> RunInfo:
    return read_run(_existing(name))


def _existing(name: str, flag: str = "RUN") -> Path:
    """The folder of this name, here or below runs/."""
    for path in (Path(name), RUNS / name):
        if path.is_dir():
            return path
    near = did_you_mean(name, [str(path) for path in find_runs(RUNS)])
    raise ConfigError(f"{flag} {name}: no such folder; expected a run or one of its checkpoints{near}")


def _around(path: Path) -> Path:
    """The run folder around a checkpoint; `path` itself where there is none. Its summary is enough to know it."""
    above = path.resolve().parent
    return above.parent if above.name == "checkpoints" and (above.parent / "metrics.json").is_file() else run_of(path)


def _all_of(run: Path) -> RunInfo:
    """The run in a folder, which may have lost its options or never come to a summary.

    Raises:
        ConfigError: it has neither, or its options are not readable.
    """
    if is_run(run):
        return read_run(run)
    if summary := read_summary(run):
        return RunInfo(run, "", {}, {}, summary)
    raise ConfigError(f"{run}: no readable metrics.json; expected a run folder, or a checkpoint inside one")
