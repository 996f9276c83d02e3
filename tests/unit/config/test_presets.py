from __future__ import annotations

from importlib import resources

import pytest

from seedbed.config import FLAGS, Layer, option_names, preset_names, read_config_file, read_preset, resolve
from seedbed.model.decoder import num_parameters
from seedbed.model.shape import decoder_config


def test_every_shipped_file_is_named_and_every_name_has_a_file() -> None:
    folder = resources.files("seedbed.config").joinpath("presets")
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.yaml" for name in preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_resolves_as_a_config_and_its_shape_can_be_built(name: str) -> None:
    assert set(read_preset(name)) <= set(option_names("scratch"))
    config = resolve("scratch", [read_config_file(name)])
    shape = decoder_config(config.model, config.data, config.data.vocab_size or 8000)
    assert shape.max_seq_len == config.data.max_seq_len
    assert num_parameters(shape) > 500_000


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # The counts of the published models (transformers' own, tied).
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    config = resolve("scratch", [Layer(FLAGS, {"model": name})])
    assert config.data.vocab_size == 50257
    assert config.data.max_seq_len == 1024
    assert num_parameters(decoder_config(config.model, config.data, 50257)) == parameters


def test_medium_shares_each_key_value_head_among_four_query_heads() -> None:
    model = resolve("scratch", [Layer(FLAGS, {"model": "medium"})]).model
    assert (model.arch, model.d_model, model.num_layers, model.num_heads, model.num_kv_heads) == (
        "llama",
        768,
        12,
        12,
        3,
    )
