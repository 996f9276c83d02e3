"""What differs between runs: options, figures, curves, answers, and whether a difference is more than luck."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from seedbed.runs.columns import COLUMNS
from seedbed.runs.curves import Axis, Curve, align
from seedbed.runs.folder import read_records
from seedbed.runs.info import RunInfo
from seedbed.runs.noise import Difference, difference
from seedbed.runs.parents import BOOKKEEPING, is_chosen
from seedbed.runs.series import read_series
from seedbed.runs.table import distinct_names
from seedbed.runs.values import as_json, plain

Measure = Literal["val_loss", "bits_per_byte"]
UNITS: dict[Measure, str] = {"val_loss": "nats per token", "bits_per_byte": "bits per byte"}

OUTCOMES = (
    *("status", "parameters", "trainable", "steps", "train_loss", "val_loss", "perplexity", "bits_per_byte"),
    *("judge", "tokens_per_second", "time", "peak_memory", "device", "notes"),
)
"""The columns that say what became of a run, where the others repeat its options."""

HELD_OUT = ("val_data", "data", "val_split", "format", "text_column", "document")
TARGETS = ("train_on_prompt", "chat_template")
TOKENS = ("tokenizer", "vocab_size", "model", "max_seq_len", "packing")
"""Options that decide which text is held out, what of it is predicted, and as which tokens."""


SEPARATORS = "-_=. /"  # between the parts of a name


@dataclass(frozen=True)
class Group:
    """Runs whose options differ only in their seed."""

    name: str
    members: tuple[int, ...]
    """Places of its runs in the comparison."""
    seeds: tuple[int, ...]
    """Of the runs that have a validation loss; a seed that ran twice counts once."""
    val_loss: float | None
    """Best validation loss in nats per token, mean over the seeds."""
    deviation: float | None
    """Standard deviation of it between the seeds; None with fewer than two."""
    bits_per_byte: float | None
    bits_deviation: float | None


@dataclass(frozen=True)
class Answers:
    """What the runs answered to one prompt."""

    prompt: str
    reference: str | None
    texts: tuple[str | None, ...]
    """One a run; None where it was not asked."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; every sequence of values has one a run, in the order of `names`."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    options: Mapping[str, tuple[Any, ...]]
    """The options that differ."""
    figures: Mapping[str, tuple[Any, ...]]
    """The columns of the runs table that differ and are no options: raw values."""
    groups: tuple[Group, ...]
    verdicts: tuple[str, ...]
    """A sentence for each pair of groups."""
    measure: Measure | None
    """The figure of held-out text in which all of them compare."""
    axis: Axis
    curves: tuple[Curve, ...]
    """In nats per token, whether or not these compare."""
    answers: tuple[Answers, ...]


def compare(runs: Sequence[RunInfo], axis: Axis = "tokens") -> Comparison:
    """The runs side by side, their curves aligned by `axis`."""
    groups = group_by_seed(runs)
    return Comparison(
        names=tuple(distinct_names(runs)),
        paths=tuple(str(run.path) for run in runs),
        options=differing_options(runs),
        figures=_differing({name: [COLUMNS[name].get(run) for run in runs] for name in OUTCOMES}),
        groups=tuple(groups),
        verdicts=tuple(_verdict(runs, first, second) for first, second in combinations(groups, 2)),
        measure=_measure_of_all(runs),
        axis=axis,
        curves=tuple(align([read_series(run.path) for run in runs], axis)),
        answers=tuple(answers_to_the_same(runs)),
    )


def differing_options(runs: Sequence[RunInfo]) -> dict[str, tuple[Any, ...]]:
    """The options that differ, and the regime if it does: a value for each run, None where it has no such option.

    An option that only some of the regimes have counts if somebody chose it.
    """
    known = dict.fromkeys(name for run in runs for name in run.options if name not in BOOKKEEPING)
    names = [
        name
        for name in known
        if all(name in run.options for run in runs) or any(name in run.options and is_chosen(run, name) for run in runs)
    ]
    options = {name: [as_json(run.options.get(name)) for run in runs] for name in names}
    return _differing({"regime": [run.regime for run in runs], **options})


def _differing(values: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(each) for name, each in values.items() if any(value != each[0] for value in each)}


def group_by_seed(runs: Sequence[RunInfo]) -> list[Group]:
    """The runs in groups whose options differ only in the seed, in the order of their first runs."""
    together: dict[Hashable, list[int]] = {}
    for place, run in enumerate(runs):
        together.setdefault(_but_for_the_seed(run), []).append(place)
    names = _names_of_groups(distinct_names(runs), list(together.values()))
    return [_group(runs, name, tuple(members)) for name, members in zip(names, together.values(), strict=True)]


def _but_for_the_seed(run: RunInfo) -> Hashable:
    ignored = BOOKKEEPING | {"seed"}
    return run.regime, *sorted((name, plain(value)) for name, value in run.options.items() if name not in ignored)


def _names_of_groups(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """What the names of a group's runs begin with, if that tells it from the other groups; else all its names."""
    starts = [_shared_start([names[place] for place in members]).rstrip(SEPARATORS) for members in groups]
    beginnings = [start.removesuffix("seed").rstrip(SEPARATORS) or start for start in starts]
    together = [" + ".join(names[place] for place in members) for members in groups]
    return [
        short if short and beginnings.count(short) == 1 else long
        for short, long in zip(beginnings, together, strict=True)
    ]


def _shared_start(names: Sequence[str]) -> str:
    return "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    )


def _group(runs: Sequence[RunInfo], name: str, members: tuple[int, ...]) -> Group:
    own = [runs[place] for place in members]
    losses, bits = _by_seed(own, "val_loss"), _by_seed(own, "bits_per_byte")
    return Group(name, members, tuple(losses), *_mean_and_deviation(losses), *_mean_and_deviation(bits))


def _by_seed(runs: Sequence[RunInfo], measure: Measure) -> dict[int, float]:
    """The figure of each seed that has one."""
    values = {run.options.get("seed", 0): COLUMNS[measure].get(run) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None}


def _mean_and_deviation(values: Mapping[int, float]) -> tuple[float | None, float | None]:
    each = list(values.values())
    return (fmean(each) if each else None), (stdev(each) if len(each) > 1 else None)


def common_measure(first: RunInfo, second: RunInfo) -> Measure | None:
    """The figure of held-out text in which two runs compare; None where that text, or what of it is predicted, differs.

    The numbers of bytes, documents and tokens in the summaries decide; for runs that have none, the options do.
    """
    same_text = _same_counts(first, second, "val_bytes", "val_documents")
    if same_text is False or (same_text is None and _held_out(first) != _held_out(second)):
        return None
    if _same_counts(first, second, "val_tokens"):
        return "val_loss"
    if _options(first, TARGETS) != _options(second, TARGETS):
        return None
    unknown = _same_counts(first, second, "val_tokens") is None
    return "val_loss" if unknown and _options(first, TOKENS) == _options(second, TOKENS) else "bits_per_byte"


def _measure_of_all(runs: Sequence[RunInfo]) -> Measure | None:
    measures = {common_measure(runs[0], run) for run in runs[1:]}
    return None if None in measures else "bits_per_byte" if "bits_per_byte" in measures else "val_loss"


def _same_counts(first: RunInfo, second: RunInfo, *names: str) -> bool | None:
    """Whether the summaries agree in these counts of the text; None where one does not have them."""
    texts = [run.summary.get("text") for run in (first, second)]
    counts = [[text.get(name) for name in names] if isinstance(text, Mapping) else [None] for text in texts]
    return None if None in counts[0] + counts[1] else counts[0] == counts[1]


def _held_out(run: RunInfo) -> list[Any]:
    """The options that decide which text is held out; given by --val_data, the rest does not matter."""
    own = run.options.get("val_data")
    return [own, *_options(run, HELD_OUT[3:])] if own else _options(run, HELD_OUT)


def _options(run: RunInfo, names: Sequence[str]) -> list[Any]:
    return [run.options.get(name) for name in names]


def _verdict(runs: Sequence[RunInfo], first: Group, second: Group) -> str:
    """Which of two groups predicts held-out text better, and whether that exceeds the seeds' noise."""
    names = f"{first.name} and {second.name}"
    if empty := [group.name for group in (first, second) if group.val_loss is None]:
        return (
            f"{names} do not compare: {' and '.join(empty)} {'has' if len(empty) == 1 else 'have'} no validation loss."
        )
    measure = common_measure(runs[first.members[0]], runs[second.members[0]])
    if measure is None:
        return f"{names} do not compare: what they were validated on is not the same."
    values = [list(_by_seed([runs[place] for place in group.members], measure).values()) for group in (first, second)]
    if not all(values):
        return f"{names} do not compare: their tokens differ, and not both have bits per byte."
    if fmean(values[0]) > fmean(values[1]):
        first, second, values = second, first, values[::-1]
    lengths = [runs[group.members[0]].options.get("max_seq_len") for group in (first, second)]
    rows = f", each in rows of its own length ({lengths[0]} and {lengths[1]})" if lengths[0] != lengths[1] else ""
    gap = difference(*values)
    return f"{_sentence(first, second, values, measure, gap)}{rows}; {_noise(first, second, gap)}"


def _sentence(better: Group, worse: Group, values: Sequence[Sequence[float]], measure: Measure, gap: Difference) -> str:
    because = "" if measure == "val_loss" else " (their tokens may differ, so losses do not compare)"
    means = " against ".join(
        plus_minus(fmean(each), stdev(each) if len(each) > 1 else None, len(each)) for each in values
    )
    by = f"{-gap.mean:.4f} {UNITS[measure]}{because}, {means}"
    if gap.exceeds_noise is False:
        return f"no clear difference: {better.name} and {worse.name} are apart by {by}"
    return f"{better.name} is better than {worse.name} by {by}"


def _noise(better: Group, worse: Group, gap: Difference) -> str:
    if gap.half_width is None:
        used = {*better.seeds, *worse.seeds}
        free = [seed for seed in range(len(used) + 2) if seed not in used][:2]
        again = " and ".join(f"--seed {seed}" for seed in free)
        return f"how much of it is the seeds' noise is unknown: run both commands again with {again}."
    low, high = -gap.mean - gap.half_width, -gap.mean + gap.half_width
    only = [group.name for group in (better, worse) if len(group.seeds) > 1]
    whose = f", with the deviation of {only[0]} for both" if len(only) == 1 else ""
    says = "exceeds" if gap.exceeds_noise else "is within"
    return f"that {says} the seeds' noise (95 % interval {low:.4f} to {high:.4f}{whose})."


def plus_minus(mean: float, deviation: float | None, count: int) -> str:
    """
    >>> plus_minus(0.78534, 0.00147, 3), plus_minus(0.9, None, 1)
    ('0.7853 ± 0.0015 (3)', '0.9000')
    """
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f} ({count})"


def answers_to_the_same(runs: Sequence[RunInfo]) -> Iterator[Answers]:
    """What runs answered to prompts that at least two of them met: the judge's questions, then samples.

    Of several answers to one prompt the last.
    """
    for name, key in (("judge/answers.jsonl", "answer"), ("samples.jsonl", "text")):
        found = [_last_records(run.path / name, key) for run in runs]
        for prompt in dict.fromkeys(prompt for records in found for prompt in records):
            records = [each.get(prompt) for each in found]
            if sum(record is not None for record in records) > 1:
                references = [record["reference"] for record in records if record and record.get("reference")]
                texts = tuple(str(record[key]) if record else None for record in records)
                yield Answers(prompt, str(references[0]) if references else None, texts)


def _last_records(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """The last record of each prompt in a file of answers."""
    return {str(record["prompt"]): record for record in read_records(path) if "prompt" in record and key in record}
