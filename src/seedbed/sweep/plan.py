"""From a sweep's file to its runs: names, parents, checked flags. All that is wrong is found here, before any start."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from seedbed.config import FLAGS, FREE_TO_CHANGE, NO_DATA, OF_ONE_RUN, Config, Layer, resolve
from seedbed.errors import ConfigError, did_you_mean
from seedbed.runs.info import is_run
from seedbed.sweep.file import Halving, SweepFile, read_sweep_file
from seedbed.sweep.inputs import unfit_inputs, unfit_text

REGIME_OF_VERB = {"pretrain": "scratch", "finetune": "finetune", "continue": "continue"}
NAME = re.compile(r"(?!logs$)[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
NAMED = 3
"""Runs that a message names before it only counts."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: `name` is also that of its folder."""

    name: str
    parent: str | None
    """The run of this sweep that it is a change of."""
    config: Config
    flags: Mapping[str, Any]
    """What the file chose, by option."""

    @property
    def settings(self) -> str:
        """The same for runs that differ only in their seed."""
        return repr({name: value for name, value in self.flags.items() if name != "seed"})

    def words(
        self, verb: str, folder: Path, *, parent: Path | None = None, stop_at_step: int | None = None
    ) -> list[str]:
        """The command line of this run in `folder`, without the program."""
        more = {"from": parent and str(parent), "output": str(folder), "stop_at_step": stop_at_step}
        return [verb, *as_flags({**self.flags, **{name: value for name, value in more.items() if value is not None}})]


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep, parents before those that change them."""

    verb: str
    runs: Mapping[str, PlannedRun]
    halving: Halving | None

    def to_yaml(self) -> str:
        """The plan as a sweep's file that lists every run with all its flags."""
        runs = {run.name: {**({"from": run.parent} if run.parent else {}), **run.flags} for run in self.runs.values()}
        halving = {"halving": self.halving.model_dump(mode="json")} if self.halving else {}
        return yaml.safe_dump({"verb": self.verb, **halving, "runs": runs}, sort_keys=False)

    def varying(self) -> list[str]:
        """The options in which runs differ."""
        names = dict.fromkeys(name for run in self.runs.values() for name in run.flags)
        return [name for name in names if len({repr(run.flags.get(name)) for run in self.runs.values()}) > 1]


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Values as words of the command line: `--lora`, `--no_packing`, `--epochs=2`; a list's one by one."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def make_plan(path: Path, folder: Path | None = None) -> Plan:
    """The runs that the file at `path` stands for.

    What runs that began in `folder` need is not looked for: a table is made of them when their texts are gone, too.

    Raises:
        ConfigError: everything that is wrong in the file, each with its place and the runs that it concerns.
    """
    file, unknown = read_sweep_file(path)
    wrong_names = list(_wrong_names(file))
    problems = [*_misplaced(file), *wrong_names, *_repeated_values(file)]
    variations = [] if wrong_names else list(_variations(file))
    found: dict[str, list[str]] = {}
    runs = {}
    look = cache(unfit_text)
    for variation in variations:
        try:
            runs[variation.name] = run = _resolved(file, variation)
            if (folder is None or not is_run(folder / run.name)) and (unfit := list(unfit_inputs(run.config, look))):
                raise ConfigError(unfit)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(variation.name)
    problems += [f"{problem} ({_said(names, len(variations))})" for problem, names in found.items()]
    if not problems:
        problems = list(_twins(variations, runs))
    if unknown or problems:
        raise ConfigError([*unknown, *(f"{path}: {problem}" for problem in problems)])
    return Plan(file.verb, runs, file.halving)


# What the file stands for


@dataclass(frozen=True)
class _Variation:
    """A run before its flags are checked: values by their place in the file, weakest first."""

    name: str
    parent: str | None
    layers: tuple[Layer, ...]


def _variations(file: SweepFile) -> Iterator[_Variation]:
    single = [*_grid_points(file), *_listed_runs(file)] or [_Variation("", None, ())]
    if file.seeds is None:
        yield from single
        return
    for seed in file.seeds:
        ending = f"seed-{_in_a_name(seed)}"
        for run in single:
            parent = run.parent and f"{run.parent}_{ending}"
            layers = (*run.layers, Layer("seeds", {"seed": seed}))
            yield _Variation(f"{run.name}_{ending}".lstrip("_"), parent, layers)


def _grid_points(file: SweepFile) -> Iterator[_Variation]:
    """Every combination; the first is the parent of the others."""
    first = None
    for values in product(*(file.grid or {}).values()) if file.grid else ():
        point = dict(zip(file.grid or {}, values, strict=True))
        name = "_".join(f"{option}-{_in_a_name(value)}" for option, value in point.items())
        yield _Variation(name, first, (Layer("grid", point),))
        first = first or name


def _listed_runs(file: SweepFile) -> Iterator[_Variation]:
    """The runs of the list, each after the one that it is `from`, whose layers it begins with."""
    made: dict[str, _Variation] = {}

    def make(name: str) -> _Variation:
        if name not in made:
            flags = dict((file.runs or {})[name])
            parent = str(flags.pop("from")) if "from" in flags else None
            inherited = make(parent).layers if parent else ()
            made[name] = _Variation(name, parent, (*inherited, Layer(f"runs.{name}", flags)))
        return made[name]

    for name in file.runs or {}:
        make(name)
    yield from made.values()


def _in_a_name(value: Any) -> str:
    """A value as a part of a folder's name: 5e-05, true, data-questions.json."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "-".join(map(_in_a_name, value))
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "none"


def _resolved(file: SweepFile, run: _Variation) -> PlannedRun:
    """The run with its options checked, as the command line will check them too.

    Raises:
        ConfigError: every problem of this run.
    """
    layers = [*_derived(file), Layer("base", file.base), *run.layers]
    if file.budget:
        layers.append(Layer("budget", file.budget.flags()))
    config = resolve(REGIME_OF_VERB[file.verb], layers)
    places = {layer.source for layer in layers}
    flags = {name: value for name, value in config.values().items() if config.sources[name] in places}
    config = resolve(REGIME_OF_VERB[file.verb], [Layer(FLAGS, flags)])
    if problems := [*_without_text(config), *_rungs_missed(file.halving, config)]:
        raise ConfigError(problems)
    return PlannedRun(run.name, run.parent, config, flags)


def _derived(file: SweepFile) -> Iterator[Layer]:
    """What follows from a budget and from rungs, unless the file says otherwise."""
    if file.budget and file.budget.hours is not None:
        yield Layer("budget", {"lr_schedule": "cosine_time"})
    if file.halving:
        yield Layer("halving", {"eval_every": math.gcd(*file.halving.rungs)})


# What may be wrong with it


def _places(file: SweepFile) -> dict[str, Mapping[str, Any]]:
    runs = {f"runs.{name}": flags for name, flags in (file.runs or {}).items()}
    return {"base": file.base, "grid": file.grid or {}, **runs}


def _misplaced(file: SweepFile) -> Iterator[str]:
    """Flags that the sweep sets itself, that two places set, or that have no value."""
    set_by = {} if file.budget is None else dict.fromkeys(file.budget.flags(), "budget")
    if file.seeds is not None:
        set_by["seed"] = "seeds"
    for place, flags in _places(file).items():
        for name, value in flags.items():
            if name in OF_ONE_RUN:
                yield f"{place}.{name}: the sweep chooses it for each run; leave it out"
            elif name in set_by:
                yield f"{place}.{name}: {set_by[name]} sets it too; leave one of them out"
            elif value is None or (place == "grid" and None in value):
                yield f"{place}.{name} has no value; give one, or leave the flag out"


def _wrong_names(file: SweepFile) -> Iterator[str]:
    runs = file.runs or {}
    for name, flags in runs.items():
        if not NAME.fullmatch(name):
            yield (
                f"runs.{name}: not a name for a folder; expected letters, digits, dots, hyphens and underscores, "
                "and not `logs`"
            )
        if "from" not in flags:
            continue
        parent = str(flags["from"])
        if parent not in runs:
            hint = did_you_mean(parent, list(runs)) or f"; expected one of {', '.join(runs)}"
            yield f"runs.{name}.from: there is no run {parent} in the list{hint}"
        elif name in (circle := _ancestors(runs, name)):
            yield f"runs.{name}.from: goes in a circle, {' from '.join([name, *circle])}; one of them must stand alone"


def _ancestors(runs: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """The runs that `name` is from, nearest first, up to the first that comes again."""
    found: list[str] = []
    while name in runs and (parent := runs[name].get("from")) is not None and parent not in found:
        found.append(name := str(parent))
    return found


def _repeated_values(file: SweepFile) -> Iterator[str]:
    for place, values in {**{f"grid.{name}": v for name, v in (file.grid or {}).items()}, "seeds": file.seeds}.items():
        for value, times in Counter(map(str, values or ())).items():
            if times > 1:
                yield f"{place}: {value} stands there {times} times; leave it once"


def _without_text(config: Config) -> Iterator[str]:
    if config.data.data is None:
        yield NO_DATA


def _rungs_missed(halving: Halving | None, config: Config) -> Iterator[str]:
    """Why runs cannot be compared at the rungs."""
    if halving is None:
        return
    every, steps = config.watching.eval_every, config.training.max_steps
    if missed := [str(rung) for rung in halving.rungs if rung % every]:
        yield f"--eval_every {every}: halving compares at step {', '.join(missed)}; expected a divisor of each rung"
    if steps is not None and halving.rungs[-1] >= steps:
        yield f"halving.rungs: {halving.rungs[-1]} is not before the last step, {steps}; expected fewer steps"
    if not config.data.val_split and config.data.val_data is None:
        yield "--val_split 0: halving compares validation losses; give --val_split or --val_data"


def _twins(variations: Sequence[_Variation], runs: Mapping[str, PlannedRun]) -> Iterator[str]:
    """Runs of one name, and runs that are the same but for their name."""
    for name, times in Counter(variation.name for variation in variations).items():
        if times > 1:
            yield f"{times} runs would be called {name}; name them in `runs` instead"
    first: dict[str, str] = {}
    for name, run in runs.items():
        same = first.setdefault(repr(run.flags), name)
        if same != name:
            yield f"{same} and {name} are the same run; leave one of them out"


def _said(names: Sequence[str], of: int) -> str:
    if len(names) == of > 1:
        return "every run"
    shown = ", ".join(names[:NAMED])
    return f"run {shown}" if len(names) <= NAMED else f"run {shown} and {len(names) - NAMED} more"


# What changed since the sweep was begun


def changes(plan: Plan, folder: Path) -> list[str]:
    """What the file says now and did not when the sweep in `folder` was begun; runs that began must be as they were.

    Raises:
        ConfigError: every flag of a run that began and is another now, with both values.
    """
    begun = folder / "sweep.yaml"
    if not begun.is_file():
        return []
    earlier, _ = read_sweep_file(begun)
    if earlier.verb != plan.verb:
        raise ConfigError(
            f"{folder} holds a sweep of seedbed {earlier.verb} and the file says {plan.verb}; choose another --output"
        )
    runs = earlier.runs or {}
    old = {name: {flag: value for flag, value in run.items() if flag != "from"} for name, run in runs.items()}
    problems = [
        f"{name}: --{flag} was {old[name].get(flag, 'not set')} when the run began and the file now says "
        f"{run.flags.get(flag, 'nothing of it')}; give the run another name, or choose another --output"
        for name, run in plan.runs.items()
        if name in old and is_run(folder / name)
        for flag in dict.fromkeys([*old[name], *run.flags])
        if flag not in FREE_TO_CHANGE and old[name].get(flag) != run.flags.get(flag)
    ]
    if problems:
        raise ConfigError(problems)
    added, gone = [n for n in plan.runs if n not in old], [n for n in old if n not in plan.runs]
    said = [f"Added since the sweep was begun: {', '.join(added)}"] if added else []
    return said + ([f"No longer in the file, left as they are: {', '.join(gone)}"] if gone else [])
