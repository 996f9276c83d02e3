"""From flags, file, preset and regime to one checked config that knows where each value came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from seedbed.config.options import (
    SECTIONS,
    STRENGTHS,
    TRAINED_HERE,
    AdaptOptions,
    DataOptions,
    KeepOptions,
    ModelOptions,
    Section,
    TrainingOptions,
    WatchOptions,
    folder_of_config,
)
from seedbed.config.regimes import REGIMES, WITH_LORA, option_names
from seedbed.disk import expanded
from seedbed.errors import ConfigError, did_you_mean
from seedbed.parsing import parse_yaml

FLAGS = "the command line"
CALL = "the call"
S = TypeVar("S", bound=Section)
BY_DEFAULT = "default"
OF_ONE_RUN = frozenset({"output", "resume_from", "resume", "stop_at_step"})
"""Options that no other run inherits."""
NO_DATA = "--data is missing: name a text file, a folder, or a source such as python-docs (`seedbed data list`)"
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Origin(Enum):
    """Who decided a value."""

    DEFAULT = auto()
    """The program, for every run of its regime."""
    PRESET = auto()
    FOUND_OUT = auto()
    """The program, for one run: from its model, its machine or another option."""
    USER = auto()
    """By a flag, in a call or in a file."""


_BEGINNINGS = {
    "regime ": Origin.DEFAULT,
    "preset ": Origin.PRESET,
    **dict.fromkeys(("model ", "this machine", "--method ", "half the peak of ", "the peak of "), Origin.FOUND_OUT),
}


def origin_of(source: str) -> Origin:
    """Who decided a value with this source, a text for people that `config.yaml` keeps; its beginning tells."""
    if source == BY_DEFAULT:
        return Origin.DEFAULT
    return next((origin for words, origin in _BEGINNINGS.items() if source.startswith(words)), Origin.USER)


@dataclass(frozen=True)
class Layer:
    """Values that came from one place, such as a file; later layers win."""

    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where values that were not chosen in this place came from, as a run's `config.yaml` remembers."""
    run: str | None = None
    """The run whose options these are."""


@dataclass(frozen=True)
class Config:
    """The resolved options of a run, by section, and the source of each value."""

    regime: str
    data: DataOptions
    model: ModelOptions
    adapt: AdaptOptions
    keeping: KeepOptions
    training: TrainingOptions
    watching: WatchOptions
    sources: Mapping[str, str]
    parent: str | None = None
    """The run whose options this one began with."""

    @property
    def with_lora(self) -> bool:
        """Whether adapters are trained, beside frozen weights."""
        return REGIMES[self.regime].with_lora

    @property
    def continues(self) -> bool:
        """Whether a domain is added to what a model knows."""
        return REGIMES[self.regime].continues

    def values(self) -> dict[str, Any]:
        """One flat mapping, as YAML has it, of the options that mean something in this regime, in documented order."""
        sections = (self.data, self.model, self.adapt, self.keeping, self.training, self.watching)
        everything = {name: value for section in sections for name, value in section.model_dump(mode="json").items()}
        return {name: everything[name] for name in option_names(self.regime)}

    def update(self, source: str, **values: Any) -> Config:
        """A copy with some values replaced, once the program has found them out."""
        sources = {**self.sources, **dict.fromkeys(values, source)}
        return replace(_build(self.regime, {**self.values(), **values}, sources), parent=self.parent)

    def is_given(self, name: str) -> bool:
        """Whether this value is neither a default nor a preset's."""
        return origin_of(self.sources[name]) in (Origin.USER, Origin.FOUND_OUT)

    def is_typed(self, name: str) -> bool:
        """Whether the user gave this value for just this run, and not in a file, where it may be for others."""
        return self.sources[name] in (FLAGS, CALL)

    def adopt(self, values: Mapping[str, Any], sources: Mapping[str, str]) -> Config:
        """A copy with `values` and where they once came from, such as those a run was begun with."""
        kept = {name: sources.get(name, BY_DEFAULT) for name in values}
        return replace(_build(self.regime, {**self.values(), **values}, {**self.sources, **kept}), parent=self.parent)

    def to_yaml(self) -> str:
        """The text of `config.yaml`: flat values, readable by `--config`, then their sources."""
        content = {"regime": self.regime, **self.values(), "sources": dict(self.sources)}
        return yaml.safe_dump(content, sort_keys=False)


def resolve(
    regime: str,
    layers: Sequence[Layer],
    unread: Sequence[str] = (),
    *,
    needs_text: bool = False,
    also: Callable[[Config], Iterable[str]] = lambda _config: (),
) -> Config:
    """Merge `layers` (weakest first) over the defaults of `regime`, which LoRA changes when they ask for it.

    unread: why other layers could not be read; what seems to be missing may stand there.
    needs_text: whether nothing can be done without `data`.
    also: finds more contradictions, where more is known than here.

    Raises:
        ConfigError: listing every unknown name, wrong type and contradiction at once.
    """
    problems = [*unread, *(problem for layer in layers for problem in _unknown(regime, layer))]
    if regime in WITH_LORA and _asks_for_lora(layers):
        regime = WITH_LORA[regime]
    presets = _preset_layer(layers, problems) if regime == "scratch" else []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in [Layer(f"regime {regime}", REGIMES[regime].defaults), *presets, *layers]:
        known = {name: value for name, value in layer.values.items() if name in option_names(regime)}
        _let_one_warmup_win(known, values, layer.source, sources, problems)
        values.update(known)
        sources.update({name: layer.origins.get(name, layer.source) for name in known})
    config = _build(regime, values, sources, problems)
    contradictions = () if unread else (*_contradictions(config, needs_text=needs_text), *also(config))
    if problems := [*problems, *contradictions]:
        raise ConfigError(problems)
    parents = [layer.run for layer in layers if layer.run]
    return replace(config, parent=parents[-1]) if parents else config


def read_config_file(name: str) -> Layer:
    """The values of a YAML file, or of a shipped preset.

    Raises:
        ConfigError: no such file or preset, or not a mapping of names to values.
    """
    path = Path(expanded(name))
    if not path.is_file():
        if name in preset_names():
            preset = read_preset(name)
            return Layer(f"preset {name}", {"model": name, **preset} if "arch" in preset else preset)
        known = ", ".join(preset_names())
        raise ConfigError(f"--config {name}: no such file, and no preset of that name. Presets: {known}.")
    values = read_yaml(path, f"--config {name}")
    decided = _pop_sources(values).items()
    origins = {name: source for name, source in decided if origin_of(source) in (Origin.DEFAULT, Origin.PRESET)}
    values.pop("regime", None)
    return Layer(name, {key.replace("-", "_"): value for key, value in values.items()}, origins)


def read_run_options(regime: str, run: str) -> Layer:
    """What was chosen for another run, to begin one of `regime` with; its defaults follow from what is chosen now.

    Raises:
        ConfigError: no such run, or one of another kind.
    """
    path = Path(expanded(run)) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--from {run}: holds no run (there is no config.yaml); expected a folder such as runs/NAME")
    saved = read_yaml(path, f"--from {run}")
    kind, sources = str(saved.pop("regime", regime)), _pop_sources(saved)
    if kind not in (regime, WITH_LORA.get(regime)):
        raise ConfigError(
            f"--from {run} is a run of another kind ({kind}, and this command means {regime}); "
            "name a run of this kind, or give its options one by one"
        )
    chosen = {
        name: value
        for name, value in saved.items()
        if name not in OF_ONE_RUN and origin_of(sources.get(name, BY_DEFAULT)) is Origin.USER
    }
    return Layer(str(path), chosen, run=str(path.parent))


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The mapping of names to values in a YAML file, which messages call `name`.

    Raises:
        ConfigError: it is something else.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{name}: not readable as YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{name}: expected lines such as `learning_rate: 0.0003`.")
    return values


def _pop_sources(values: dict[str, Any]) -> dict[str, str]:
    """Where the values of a run's config came from, as it says itself; nothing in files that people write."""
    sources = values.pop("sources", {})
    return {str(name): str(source) for name, source in sources.items()} if isinstance(sources, dict) else {}


def read_section(section: type[S], values: Mapping[str, Any], source: str) -> S:
    """One section from values that came from `source`.

    Raises:
        ConfigError: every value that is wrong, and every unknown name.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        sources = dict.fromkeys(values, source)
        known = list(section.model_fields)
        unknown = [name for name in values if name not in known]
        problems = [f"unknown option {name} in {source}{did_you_mean(name, known)}" for name in unknown]
        wrong = [_explain(detail, values, sources) for detail in error.errors() if detail["loc"][0] not in unknown]
        raise ConfigError([*problems, *wrong]) from None


def preset_names() -> list[str]:
    """Names of the shipped presets, smallest model first."""
    gpt2 = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return ["tiny", "small", "medium", *gpt2, "demo", "shakespeare-char", "data-limited"]


def read_preset(name: str) -> dict[str, Any]:
    """The values of a shipped preset."""
    text = resources.files("seedbed.config").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    return values


def where(name: str, value: Any, source: str) -> str:
    """How an option is named in messages: `--epochs 0 (set on the command line)`."""
    place = "set on the command line" if source == FLAGS else f"from {source}"
    return f"--{name} {value} ({place})"


def _unknown(regime: str, layer: Layer) -> Iterable[str]:
    names = option_names(regime)
    elsewhere = {name for other in REGIMES for name in option_names(other)}
    for name in layer.values:
        if name not in names:
            place = "" if layer.source == FLAGS else f" in {layer.source}"
            what = f"--{name}" if layer.source == FLAGS else name
            if name in elsewhere:
                yield f"{what}{place} has no meaning when {REGIMES[regime].doing}; leave it out"
            else:
                yield f"unknown option {what}{place}{did_you_mean(name, names)}"


def _asks_for_lora(layers: Sequence[Layer]) -> bool:
    """Whether `lora` is on, or not off and one of the options of adapters is given."""
    given = {name: value for layer in layers for name, value in layer.values.items()}
    if given.get("lora") is not None:
        return str(given["lora"]).lower() not in ("false", "no", "off", "n", "f", "0")  # as pydantic reads them
    chosen = [name for layer in layers for name in layer.values if name not in layer.origins]
    return any(name.startswith("lora_") for name in chosen)


def _preset_layer(layers: Sequence[Layer], problems: list[str]) -> list[Layer]:
    """The preset that `model` names; it goes beneath the layers, so that every flag and file value wins over it."""
    named = [layer for layer in layers if "model" in layer.values]
    name = expanded(str(folder_of_config(named[-1].values["model"]))) if named else REGIMES["scratch"].defaults["model"]
    if name in preset_names():
        preset = read_preset(name)
        if "arch" in preset:
            return [Layer(f"preset {name}", preset)]
        problems.append(f"{where('model', name, named[-1].source)}: a preset without a shape; give it with --config")
        return []
    if not _is_model_folder(name):
        place = where("model", name, named[-1].source)
        problems.append(
            f"{place}: no preset of that name ({', '.join(preset_names())}) and no folder with a config.json"
            f"{did_you_mean(name, preset_names())}"
        )
    return []


def _is_model_folder(name: str) -> bool:
    try:
        return (Path(name) / "config.json").is_file()
    except OSError:  # no file can have that name, or nobody may look
        return False


def _let_one_warmup_win(
    new: Mapping[str, Any], values: dict[str, Any], source: str, sources: dict[str, str], problems: list[str]
) -> None:
    """Warm-up is given in steps or as a ratio: a stronger layer's choice replaces a weaker layer's."""
    pair = ("warmup_steps", "warmup_ratio")
    given = [name for name in pair if new.get(name) is not None]
    if len(given) == 2:
        problems.append(f"--warmup_steps and --warmup_ratio are both set by {source}; give one of them")
    for name in pair if given else ():
        values.pop(name, None)
        sources.pop(name, None)


def _build(regime: str, values: Mapping[str, Any], sources: Mapping[str, str], problems: Sequence[str] = ()) -> Config:
    found = list(problems)
    sections: list[Any] = []
    for section in SECTIONS:
        own = {name: values[name] for name in section.model_fields if name in values}
        confused = [name for name, value in own.items() if isinstance(value, bool) and _is_number(section, name)]
        for name in confused:
            place = where(name, own[name], sources.get(name, BY_DEFAULT))
            found.append(f"{place}: expected a number, not yes or no")
        try:
            sections.append(section.model_validate(own))
        except ValidationError as error:
            details = [detail for detail in error.errors() if detail["loc"][0] not in confused]
            found += [_explain(detail, values, sources) for detail in details]
    if len(sections) < len(SECTIONS) or len(found) > len(problems):
        raise ConfigError(found)
    all_sources = {name: sources.get(name, BY_DEFAULT) for name in option_names(regime)}
    data, model, adapt, keeping, training, watching = sections
    return Config(regime, data, model, adapt, keeping, training, watching, all_sources)


def _is_number(section: type[Section], name: str) -> bool:
    annotation = str(section.model_fields[name].annotation)
    return "int" in annotation or "float" in annotation


def _explain(detail: Any, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    name = str(detail["loc"][0])
    message = str(detail["msg"]).removeprefix("Input should be ")
    expected = message[0].lower() + message[1:].replace("input should be ", "")
    return f"{where(name, values.get(name), sources.get(name, BY_DEFAULT))}: expected {expected}"


def _contradictions(config: Config, *, needs_text: bool) -> Iterable[str]:
    data, training, sources = config.data, config.training, config.sources

    def say(name: str) -> str:
        return where(name, config.values()[name], sources[name])

    known = (data.data, config.watching.output, config.watching.resume_from, config.keeping.rollback_to)
    if needs_text and not any(known):  # the last three lead to a run that has a text
        yield NO_DATA
    if training.min_lr > training.learning_rate:
        yield f"{say('min_lr')} is above {say('learning_rate')}; lower it"
    if training.lr_schedule == "constant" and config.is_typed("min_lr"):
        yield f"{say('min_lr')} has no meaning with --lr_schedule constant; leave one of them out"
    if data.val_data and config.is_typed("val_split") and data.val_split > 0:
        yield f"{say('val_split')} contradicts {say('val_data')}; leave one of them out"
    if data.vocab_size and data.tokenizer != "bpe" and config.is_typed("vocab_size"):
        yield f"{say('vocab_size')} only applies to a tokenizer trained here; leave it out with {say('tokenizer')}"
    if data.streaming:
        yield from _contradictions_of_streaming(config, say)
    if training.optimizer == "sgd":
        for name in ("beta2", "epsilon"):
            if config.is_typed(name):
                yield f"{say(name)} has no meaning with --optimizer sgd; leave it out"
    if training.parallel == "fsdp":
        yield from _contradictions_of_sharding(config, say)
    if config.regime == "scratch":
        return
    if not config.model.model and not config.watching.resume_from:
        yield "--model is missing: name a model folder, a run, or a hub id such as HuggingFaceTB/SmolLM2-135M"
    if data.tokenizer in TRAINED_HERE:
        yield f"{say('tokenizer')}: a pretrained model only knows its own tokenizer; leave it out"
    if config.continues:
        yield from _contradictions_of_keeping(config, say)
    yield from _contradictions_of_lora(config, say)


def _contradictions_of_streaming(config: Config, say: Callable[[str], str]) -> Iterable[str]:
    if not (config.training.max_steps or config.training.max_tokens):
        yield f"{say('streaming')} has no end of its own; give --max_steps or --max_tokens"
    if config.is_given("epochs"):
        yield f"{say('epochs')} has no meaning with --streaming; give --max_steps or --max_tokens"
    if config.data.augment_word_swap:
        yield f"{say('augment_word_swap')} needs the whole text, and --streaming never has it; leave one of them out"
    if config.continues:
        yield f"{say('streaming')} is for pretrain and finetune; leave it out"


def _contradictions_of_lora(config: Config, say: Callable[[str], str]) -> Iterable[str]:
    """Of its options with one another; without it, those that only it has."""
    adapt = config.adapt
    if not config.with_lora:
        for name in (*(n for n in AdaptOptions.model_fields if n.startswith("lora_")), "base_precision"):
            if config.is_given(name):
                yield f"{say(name)} has no meaning without --lora; leave it out, or add --lora"
        return
    if config.training.optimizer == "muon":
        yield f"{say('optimizer')} is for whole matrices, and --lora trains thin ones; choose adamw"
    if adapt.freeze:
        yield f"{say('freeze')} contradicts --lora, which freezes everything but its adapters; choose --lora_targets"
    if adapt.add_tokens and not adapt.lora_embeddings:
        yield f"{say('add_tokens')}: new tokens learn nothing while the embeddings are frozen; add --lora_embeddings"


def _contradictions_of_sharding(config: Config, say: Callable[[str], str]) -> Iterable[str]:
    """What needs whole weights in every process."""
    training, adapt = config.training, config.adapt
    if training.optimizer in ("muon", "adamw8bit"):
        yield f"{say('optimizer')} needs whole weights, and --parallel fsdp spreads them; choose adamw, or ddp"
    if training.precision == "fp16":
        yield f"{say('precision')} has no loss scaling under --parallel fsdp; choose bf16 or fp32, or ddp"
    if adapt.base_precision == "nf4":
        yield f"{say('base_precision')} needs whole weights, and --parallel fsdp spreads them; leave one of them out"
    if config.continues:
        yield f"{say('parallel')}: what holds a model to what it knew needs whole weights; choose ddp"


def _contradictions_of_keeping(config: Config, say: Callable[[str], str]) -> Iterable[str]:
    keeping = config.keeping
    going_back = keeping.rollback_to and config.data.data is None
    if not keeping.domain and not going_back and not config.watching.resume_from:
        yield "--domain is missing: name what is learnt, as the model's history will call it, such as --domain medical"
    if keeping.domain and not DOMAIN_NAME.fullmatch(keeping.domain):
        yield f"{say('domain')}: expected letters, digits, dots, hyphens and underscores, at most 64 of them"
    given = [name for name in STRENGTHS if getattr(keeping, name)]
    parts = [part.strip() for part in keeping.method.split(",")]
    for part in parts:
        if part not in (*STRENGTHS, "auto", "naive"):
            known = ["auto", "naive", *STRENGTHS]
            yield f"{say('method')}: {part!r} is unknown; expected {', '.join(known)}{did_you_mean(part, known)}"
    if len(parts) > 1 and (alone := {"auto", "naive"} & set(parts)):
        yield f"{say('method')}: {alone.pop()} stands alone; leave it out or leave the others out"
    if parts == ["naive"] and given:
        yield f"{say('method')} contradicts {', '.join(say(name) for name in given)}; leave one of them out"
    off = [part for part in parts if part in STRENGTHS and getattr(keeping, part) in (0, False)]
    if off:
        yield f"{say('method')} contradicts {', '.join(say(name) for name in off)}; leave one of them out"
    if (keeping.replay or 0) + (keeping.self_replay or 0) >= 1:
        yield f"{say('replay')} and {say('self_replay')} leave nothing for the new text; lower them"
    if keeping.max_forgetting is None and config.is_given("on_forgetting"):
        yield f"{say('on_forgetting')} has no meaning without --max_forgetting; give the limit, or leave it out"
    if config.with_lora:
        for name in ("l2_sp", "ewc"):
            if name in parts or getattr(keeping, name):
                yield f"--{name} has no meaning with --lora, which freezes the old weights; leave one of them out"
        if config.adapt.lora_dora and ("interpolate" in parts or keeping.interpolate):
            yield "--interpolate has no meaning with --lora_dora, whose weights are on no line; leave one of them out"
