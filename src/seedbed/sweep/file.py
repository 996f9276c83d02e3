"""A sweep's file as people write it: its form is checked here, its flags in `plan.py`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from seedbed.config import Section
from seedbed.errors import ConfigError, did_you_mean
from seedbed.parsing import parse_yaml

Some = Field(min_length=1)


class Budget(Section):
    """How far each run goes; one of the three."""

    max_steps: Any = None
    max_tokens: Any = None
    hours: Any = None

    def flags(self) -> dict[str, Any]:
        """The flags that stand for it."""
        named = {"max_steps": self.max_steps, "max_tokens": self.max_tokens, "max_training_hours": self.hours}
        return {name: value for name, value in named.items() if value is not None}

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        if len(self.flags()) != 1:
            raise ValueError("one of max_steps, max_tokens and hours")
        return self


class Halving(Section):
    """At each rung, a step, the runs are compared and the worse part of them goes no further."""

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share that goes on."""
    rungs: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Some]

    @model_validator(mode="after")
    def _rising(self) -> Halving:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError("rungs that rise, such as [50, 100]")
        return self


class SweepFile(Section):
    """What the file says, before its flags are looked at."""

    verb: Literal["pretrain", "finetune", "continue"]
    base: dict[str, Any] = Field(default_factory=dict)
    grid: Annotated[dict[str, Annotated[list[Any], Some]] | None, Some] = None
    runs: Annotated[dict[str, dict[str, Any]] | None, Some] = None
    seeds: Annotated[list[Any] | None, Some] = None
    budget: Budget | None = None
    halving: Halving | None = None

    @model_validator(mode="after")
    def _varies(self) -> SweepFile:
        if self.grid is None and self.runs is None and self.seeds is None:
            raise ValueError("at least one of grid, runs and seeds: there is nothing that varies")
        return self


def read_sweep_file(path: Path) -> tuple[SweepFile, list[str]]:
    """The sweep in a YAML file, and what is to be said of keys in it that nobody knows.

    Raises:
        ConfigError: every key that stands there twice, or holds something else than was expected; unknown ones too.
    """
    content = _with_underscores(_content_of(path))
    try:
        return SweepFile.model_validate(content), []
    except ValidationError as error:
        details = error.errors()
    problems = [f"{path}: {_explain(detail)}" for detail in details]
    unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
    try:
        return SweepFile.model_validate(_without(content, unknown)), problems
    except ValidationError:
        raise ConfigError(problems) from None


def _content_of(path: Path) -> dict[Any, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the sweep's file cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys such as `verb: finetune` and `grid:`; see docs/sweep.md")
    return content


def _without(content: Mapping[str, Any], places: Collection[tuple[int | str, ...]]) -> dict[str, Any]:
    """The content without these keys, each at the top or in one of its parts."""
    return {
        key: {name: below for name, below in value.items() if (key, name) not in places}
        if isinstance(value, dict)
        else value
        for key, value in content.items()
        if (key,) not in places
    }


def _with_underscores(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The content with flags as the command line's own names: underscores for hyphens. Names of runs stay."""
    changed = {str(key): value for key, value in content.items()}
    for name in ("base", "grid"):
        if isinstance(changed.get(name), dict):
            changed[name] = _underscored(changed[name])
    if isinstance(runs := changed.get("runs"), dict):
        changed["runs"] = {
            str(name): _underscored(flags) if isinstance(flags, dict) else flags for name, flags in runs.items()
        }
    return changed


def _underscored(flags: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in flags.items()}


KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(SweepFile.model_fields),
    "budget": tuple(Budget.model_fields),
    "halving": tuple(Halving.model_fields),
}


def _explain(detail: Any) -> str:
    """One of pydantic's findings as a sentence that begins with the place in the file."""
    *above, last = [str(part) for part in detail["loc"]] or ["the file"]
    place = ".".join([*above, last])
    match detail["type"]:
        case "extra_forbidden":
            known = KEYS[".".join(above)]
            return f"unknown key {place}{did_you_mean(last, known) or '; expected ' + ', '.join(known)}"
        case "missing":
            return f"{place} is missing; expected {_expected(place)}"
        case "too_short":
            return f"{place} is empty; expected at least one"
        case "value_error":
            return f"{place}: expected {detail['ctx']['error']}"
    return f"{place}: expected {_expected(place) or str(detail['msg']).removeprefix('Input should be ')}"


def _expected(place: str) -> str:
    """What stands in a place of the file, where pydantic's own words would be too technical."""
    match place.split("."):
        case ["verb"]:
            return "pretrain, finetune or continue"
        case ["base"]:
            return "flags, such as `model: gpt2`"
        case ["grid"]:
            return "flags with lists of values, such as `lora_r: [16, 32]`"
        case ["grid", _]:
            return "a list of values, such as [16, 32]"
        case ["runs"]:
            return "named runs, such as `longer: {epochs: 2}`"
        case ["runs", _]:
            return "flags in braces, such as {epochs: 2}; {} for a run that changes nothing"
        case ["seeds"]:
            return "a list, such as [0, 1, 2]"
        case ["budget"]:
            return "{max_steps: N}, {max_tokens: N} or {hours: H}"
        case ["halving"]:
            return "{keep: SHARE, rungs: [STEP, ...]}"
        case ["halving", "rungs", *_]:
            return "steps, such as [50, 100]"
    return ""
