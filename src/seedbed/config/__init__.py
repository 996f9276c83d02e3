"""The options of a run: documented once, merged from every source, checked together."""

from seedbed.config.options import (
    FREE_TO_CHANGE,
    REGIMES,
    SECTIONS,
    DataOptions,
    ModelOptions,
    SamplingOptions,
    Section,
    TextOptions,
    TrainingOptions,
    WatchOptions,
    option_names,
)
from seedbed.config.resolve import (
    FLAGS,
    Config,
    Layer,
    preset_names,
    read_config_file,
    read_preset,
    resolve,
    where,
)

__all__ = [
    "FLAGS",
    "FREE_TO_CHANGE",
    "REGIMES",
    "SECTIONS",
    "Config",
    "DataOptions",
    "Layer",
    "ModelOptions",
    "SamplingOptions",
    "Section",
    "TextOptions",
    "TrainingOptions",
    "WatchOptions",
    "option_names",
    "preset_names",
    "read_config_file",
    "read_preset",
    "resolve",
    "where",
]
