"""The verb that has a model's answers judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field
from rich.console import Console

from seedbed.cli.console import json_option, make_console, print_json, say
from seedbed.cli.models import device_option, held_out_documents, model_option
from seedbed.cli.options import given, read_sampling, sections
from seedbed.cli.verb import Verb, noting, report, wrong_flags
from seedbed.config import FLAGS, PathName, SamplingOptions, Section, read_section
from seedbed.disk import expanded
from seedbed.errors import ConfigError, SeedbedError
from seedbed.judge.references import chrf
from seedbed.runs.folder import require_whole_summary, update_summary
from seedbed.runs.info import is_run, read_run, run_of

if TYPE_CHECKING:
    from seedbed.judge.ask import Judge
    from seedbed.judge.judging import ModelScore, Preference, Result
    from seedbed.judge.questions import Question
    from seedbed.judge.scores import Estimate

OF_AN_ADDRESS = (
    *("judge_temperature", "judge_concurrency", "judge_timeout", "judge_retries", "judge_price"),
    "repeats",  # a local judge always gives the same score
)


class JudgeOptions(Section):
    """The judge"""

    judge_url: str | None = Field(
        None, description="Address of a server with an OpenAI-compatible API, such as http://127.0.0.1:8000/v1."
    )
    judge_model: str | None = Field(
        None, description="Which of the server's models judges; by default the first it lists."
    )
    judge: PathName | None = Field(None, description="A local checkpoint, run or transformers folder to judge instead.")
    repeats: Annotated[int, Field(gt=0)] = Field(1, description="How many times each answer is scored.")
    judge_temperature: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Sampling temperature of the judge. [0, or 1 with --repeats]"
    )
    judge_concurrency: Annotated[int, Field(gt=0)] = Field(4, description="Requests at once.")
    judge_timeout: Annotated[float, Field(gt=0)] = Field(60.0, description="Seconds to wait for a reply.")
    judge_retries: Annotated[int, Field(ge=0)] = Field(
        5, description="How many times to repeat a request after an overload, an error or a time-out."
    )
    judge_price: Annotated[str, Field(pattern=r"^\d+(\.\d+)?,\d+(\.\d+)?$")] | None = Field(
        None, description="Price of a million tokens that the judge reads and writes, as IN,OUT; shows the cost."
    )


class AnswerOptions(SamplingOptions):
    """Answers"""

    max_new_tokens: Annotated[int, Field(gt=0)] = Field(128, description="The most tokens in an answer.")
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Above 1 makes tokens less likely once they have appeared."
    )
    greedy: bool = Field(True, description="Always take the likeliest token; --no_greedy samples.")


@click.command(
    "judge", cls=Verb, epilog="Example: seedbed judge --model runs/answers --judge_url http://127.0.0.1:8000/v1"
)
@model_option
@click.option("--data", help="Questions with answers, as for training; by default those that the run held out.")
@click.option(
    "--format", "form", default="auto", help="What --data holds: alpaca, qa, chat, completion; auto detects it. [auto]"
)
@click.option(
    "--chat_template", help="Template to ask the models with; by default each model's own, else the first model's."
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask only this many questions, spread over the data.")
@click.option(
    "--baseline",
    type=expanded,
    default="auto",
    metavar="TEXT",
    help="A model to score for comparison: a folder or hub id, `none`, or the one the run started from. [auto]",
)
@click.option(
    "--against",
    type=expanded,
    metavar="FOLDER",
    help="Another model; the judge compares the two answers to each question, in both orders.",
)
@click.option("--output", type=expanded, metavar="FOLDER", help="Where to keep answers and replies. [RUN/judge]")
@click.option("--batch_size", type=click.IntRange(min=1), default=16, help="Answers to write at once. [16]")
@device_option
@json_option
@sections(JudgeOptions, AnswerOptions)
@click.pass_context
def judge(
    ctx: click.Context,
    /,
    model: str,
    data: str | None,
    form: str,
    chat_template: str | None,
    limit: int | None,
    baseline: str,
    against: str | None,
    output: str | None,
    batch_size: int,
    device: str,
    as_json: bool,
    **_flags: Any,
) -> None:
    """Let a judge score a model's answers against references, 0 to 100; without a judge, measure how close they are.

    The judge is a model on a server (--judge_url, with its key in SEEDBED_JUDGE_KEY) or a local one (--judge).
    Answers and scores are kept: the same command asks only for what is missing. Needs the extra `judge`.
    """
    problems = wrong_flags(ctx)
    with noting(problems):
        options = read_section(JudgeOptions, given(ctx, JudgeOptions.model_fields), FLAGS)
        _refuse_contradictions(options, model, against)
    with noting(problems):
        sampling = read_sampling(ctx, AnswerOptions)
    report(problems)
    chrf("", "")  # without its library nothing is asked
    folder = _transcripts(model, output)
    run = run_of(Path(model))
    scored = is_run(run) and bool(options.judge_url or options.judge)
    if scored:
        require_whole_summary(run)
    models, remark = _models(model, baseline, against)
    questions, kind = _questions(model, data, form, limit)
    from seedbed import distributed
    from seedbed.device import pick_device
    from seedbed.judge.answers import Asking
    from seedbed.judge.judging import judge_models
    from seedbed.streams import outlasting_readers

    with outlasting_readers(), distributed.joined():
        device = str(distributed.local_device(pick_device(device)))
        console = make_console(as_json) if distributed.is_first() else Console(quiet=True)
        result = judge_models(
            models,
            questions,
            Asking(kind, sampling, chat_template, batch_size, device),
            _make_judge(options, device),
            folder,
            partial(_counting, console),
            repeats=options.repeats,
            against=against,
        )
        if not distributed.is_first():
            return
    record = {"data": data or f"held out by {model}", **_record(result, against, options.judge_price)}
    if as_json:
        print_json({**record, "transcripts": str(folder)})
    else:
        _show(console, result, against, record["cost"])
        if remark:
            say(console, remark)
        say(console, f"Answers and replies: {folder}")
    if scored:
        update_summary(run, judge=record)


def _refuse_contradictions(options: JudgeOptions, model: str, against: str | None) -> None:
    problems = []
    if options.judge_url and options.judge:
        problems.append("--judge_url and --judge are two judges; give one of them")
    if options.judge_model and not options.judge_url:
        problems.append("--judge_url is missing beside --judge_model; name the address where this model is served")
    if not options.judge_url:
        vain = [name for name in OF_AN_ADDRESS if name in options.model_fields_set]
        problems += [f"--{name} has no meaning without --judge_url; leave it out" for name in vain]
    if against is not None and Path(against).resolve() == Path(model).resolve():
        problems.append(f"--against {against} is --model itself; name another run")
    if problems:
        raise ConfigError(problems)


def _transcripts(model: str, output: str | None) -> Path:
    """The folder where answers and replies are kept."""
    run = run_of(Path(model))
    if output is None and not is_run(run):
        raise ConfigError(
            f"--output is missing: --model {model} is no run, and answers and replies are kept in a folder"
        )
    return Path(output) if output else run / "judge"


def _models(model: str, baseline: str, against: str | None) -> tuple[dict[str, Path], str | None]:
    """Folders of all models by name, the one to judge first, and what is to say of the baseline."""
    models = {model: _folder_of(model, "--model")}
    remark = None
    name = _parent(model) if baseline == "auto" else None if baseline == "none" else baseline
    if name:
        try:
            models.setdefault(name, _folder_of(name, "--baseline"))
        except SeedbedError:
            if baseline != "auto":
                raise
            remark = f"{name}, from which the run began, is not here; to score it too, name it with --baseline"
    if against:
        models.setdefault(against, _folder_of(against, "--against"))
    return models, remark


def _folder_of(name: str, flag: str) -> Path:
    """The model folder that a flag means: a checkpoint, a run's best, a transformers folder, or a hub id."""
    from seedbed.checkpoint import find_model
    from seedbed.model.hub import find_pretrained

    return find_model(name) if Path(name).is_dir() else find_pretrained(name, flag)


def _parent(model: str) -> str | None:
    """The model whose weights a run began from; None for a run from scratch, or no run."""
    if not is_run(run_of(Path(model))):
        return None
    run = read_run(model)
    return None if run.regime == "scratch" else run.options.get("model") or None


def _questions(model: str, data: str | None, form: str, limit: int | None) -> tuple[list[Question], str]:
    """What to ask, and in which format it is.

    Raises:
        DataError, ConfigError: there is nothing to ask.
    """
    from seedbed.data import open_whole
    from seedbed.judge.questions import read_questions

    if data:
        source = open_whole(data, format=form)
        documents, kind = source.documents(), source.format
    else:
        documents, kind = held_out_documents(model)
    if kind == "text":
        where = f"--data {data} is" if data else f"what {model} held out is"
        raise ConfigError(f"{where} text, and only answers to questions can be judged; give such rows with --data")
    return read_questions(documents, limit), kind


def _make_judge(options: JudgeOptions, device: str) -> Judge | None:
    if options.judge:
        from seedbed.judge.local import LocalJudge

        return LocalJudge(options.judge, _folder_of(options.judge, "--judge"), device)
    if not options.judge_url:
        return None
    from seedbed.judge.client import Endpoint, served_model

    temperature = options.judge_temperature
    if temperature is None:
        temperature = 1.0 if options.repeats > 1 else 0.0
    return Endpoint(
        options.judge_url,
        options.judge_model or served_model(options.judge_url, options.judge_timeout),
        concurrency=options.judge_concurrency,
        timeout=options.judge_timeout,
        retries=options.judge_retries,
        temperature=temperature,
        say=partial(click.echo, err=True),
    )


@contextmanager
def _counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar; without a terminal, a line at its beginning."""
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        say(console, f"{what} ({total:,})...")
        yield lambda _done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda done: bar.update(task, completed=done)


def _record(result: Result, against: str | None, price: str | None) -> dict[str, Any]:
    """The result as `metrics.json` and `--json` have it; tokens and cost are those of all models together."""
    read, written = result.tokens()
    others = {}
    for name in list(result.scores)[1:]:
        difference = result.difference(name)
        others[name] = {**result.scores[name].to_json(), "difference": asdict(difference) if difference else None}
    baseline = next((other for name, other in others.items() if name != against), None)
    preference = result.preference.to_json() if result.preference else None
    return {
        "judge": result.judge,
        "repeats": result.repeats,
        **result.model.to_json(),
        "prompt_tokens": read,
        "completion_tokens": written,
        "cost": _cost(read, written, price),
        "baseline": baseline,
        "against": {**others[against], "preference": preference} if against else None,
    }


def _cost(read: int, written: int, price: str | None) -> float | None:
    if price is None:
        return None
    reading, writing = (float(amount) / 1e6 for amount in price.split(","))
    return read * reading + written * writing


def _show(console: Console, result: Result, against: str | None, cost: float | None) -> None:
    """The table of models, and the sentences below it."""
    from rich.markup import escape
    from rich.table import Table

    columns = ("Model", "Score", "95 %", "Exact", "chrF", "Unparsable", "Tokens")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column == "Model" else "right", overflow="fold")
    for score in result.scores.values():
        table.add_row(*map(escape, _row(score)))
    console.print(table)
    for sentence in _sentences(result, against, cost):
        say(console, sentence)


def _row(score: ModelScore) -> list[str]:
    estimate, asked = score.score, score.requests
    return [
        score.model,
        f"{estimate.mean:.1f}" if estimate else "-",
        _band(estimate) if estimate else "-",
        f"{score.exact_match:.1%}",
        f"{score.chrf:.1f}",
        f"{asked.unparsable:,}",
        f"{asked.prompt_tokens + asked.completion_tokens:,}",
    ]


def _sentences(result: Result, against: str | None, cost: float | None) -> Iterator[str]:
    model = result.model
    yield f"{model.questions:,} questions" + (f", judged by {result.judge}." if result.judge else ".")
    if result.judge:
        yield "The intervals say what other such questions would change (bootstrap), not how well the judge judges."
    if model.spread is not None:
        yield f"One answer's score varies by {model.spread:.1f} between {result.repeats} repeats (standard deviation)."
    for name in list(result.scores)[1:]:
        if difference := result.difference(name):
            yield f"Against {name}, question by question: {difference.mean:+.1f} ({_band(difference, '+')})."
    if result.preference and against:
        yield _preferred(result.preference, against)
    for score in result.scores.values():
        if score.unanswered:
            yield f"{score.unanswered:,} questions do not fit the context of {score.model}; their answers are empty."
        if score.requests.failed:
            yield f"{score.requests.failed:,} requests about {score.model} failed; the same command asks them again."
    if cost is not None:
        yield f"Cost of all replies: {cost:.4f}."
    if result.judge is None:
        yield "No judge: add --judge_url ADDRESS, or --judge FOLDER, for a score."


def _preferred(preference: Preference, against: str) -> str:
    won, tied, lost = (preference.outcomes.get(name, 0) for name in ("win", "tie", "loss"))
    sentence = f"Against {against}, in pairs: {won:,} won, {tied:,} tied, {lost:,} lost"
    if rate := preference.win_rate:
        sentence += f"; win rate {rate.mean:.1%} ({_share(rate.low)} to {_share(rate.high)}), a tie as half"
    if preference.inconsistent is not None:
        sentence += f". With the order of the answers {preference.inconsistent:.1%} of the verdicts changed"
    return sentence + "."


def _band(estimate: Estimate, sign: str = "") -> str:
    if estimate.low is None or estimate.high is None:
        return "unknown"
    return f"{estimate.low:{sign}.1f} to {estimate.high:{sign}.1f}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
