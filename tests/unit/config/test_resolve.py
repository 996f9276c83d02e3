from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from seedbed.config import (
    FLAGS,
    Config,
    Layer,
    option_names,
    preset_names,
    read_config_file,
    read_preset,
    read_run_options,
    resolve,
)
from seedbed.errors import ConfigError


def flags(**values: Any) -> Config:
    return resolve("scratch", [Layer(FLAGS, values)])


def problems(*layers: Layer) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve("scratch", list(layers))
    return caught.value.problems


# Which value wins, and what is said about where it came from


def test_each_layer_wins_over_the_one_below_and_is_named_as_the_source() -> None:
    # `learning_rate` has a value in the regime, in the preset tiny, in the file and on the command line.
    regime = resolve("scratch", [Layer(FLAGS, {"model": "medium"})])
    assert (regime.training.learning_rate, regime.sources["learning_rate"]) == (3e-4, "regime scratch")

    preset = resolve("scratch", [Layer(FLAGS, {"model": "tiny"})])
    assert (preset.training.learning_rate, preset.sources["learning_rate"]) == (2e-3, "preset tiny")

    file = Layer("my.yaml", {"model": "tiny", "learning_rate": 7e-4})
    assert resolve("scratch", [file]).training.learning_rate == 7e-4
    assert resolve("scratch", [file]).sources["learning_rate"] == "my.yaml"

    both = resolve("scratch", [file, Layer(FLAGS, {"learning_rate": "9e-4"})])
    assert (both.training.learning_rate, both.sources["learning_rate"]) == (9e-4, FLAGS)
    assert both.sources["model"] == "my.yaml"

    assert (both.training.beta2, both.sources["beta2"]) == (0.95, "default")


def test_a_preset_named_on_the_command_line_loses_to_values_in_the_file() -> None:
    config = resolve("scratch", [Layer("my.yaml", {"d_model": 96}), Layer(FLAGS, {"model": "tiny"})])
    assert config.model.d_model == 96
    assert config.sources["d_model"] == "my.yaml"
    assert config.sources["num_layers"] == "preset tiny"


def test_the_model_named_last_decides_the_preset() -> None:
    config = resolve("scratch", [Layer("my.yaml", {"model": "gpt2-xl"}), Layer(FLAGS, {"model": "tiny"})])
    assert config.model.d_model == read_preset("tiny")["d_model"]
    assert "preset gpt2-xl" not in config.sources.values()


def test_every_option_has_a_source() -> None:
    config = flags(model="tiny", seed=3)
    assert list(config.values()) == option_names("scratch")
    assert set(config.sources) == set(option_names("scratch"))
    assert config.is_given("seed")
    assert not any(config.is_given(name) for name in ("beta1", "epochs", "d_model"))


def test_flags_are_text_and_become_numbers_and_truths() -> None:
    config = flags(model="tiny", epochs="4", learning_rate="1e-3", dropout="0.1", compile=True, vocab_size="300")
    values = config.values()
    assert (values["epochs"], values["learning_rate"], values["dropout"]) == (4, 1e-3, 0.1)
    assert values["compile"] is True
    assert values["vocab_size"] == 300


def test_update_and_adopt_say_where_values_are_from() -> None:
    config = flags(model="tiny").update("this machine", precision="fp32")
    assert (config.training.precision, config.sources["precision"]) == ("fp32", "this machine")
    adopted = config.adopt({"seed": 5, "epochs": 9}, {"seed": FLAGS})
    assert (adopted.training.seed, adopted.sources["seed"]) == (5, FLAGS)
    assert adopted.sources["epochs"] == "default"


# Warm-up in steps or as a ratio


@pytest.mark.parametrize(
    ("file", "flag", "expected"),
    [
        ({}, {}, (None, 0.05)),
        ({}, {"warmup_steps": "100"}, (100, None)),
        ({"warmup_steps": 100}, {"warmup_ratio": "0.1"}, (None, 0.1)),
        ({"warmup_ratio": 0.2}, {"warmup_steps": "0"}, (0, None)),
        ({"warmup_ratio": 0.2}, {}, (None, 0.2)),
        ({"warmup_steps": None, "warmup_ratio": 0.2}, {}, (None, 0.2)),
    ],
)
def test_the_stronger_layer_decides_how_warm_up_is_given(
    file: dict[str, Any], flag: dict[str, Any], expected: tuple[int | None, float | None]
) -> None:
    config = resolve("scratch", [Layer("my.yaml", file), Layer(FLAGS, flag)])
    assert (config.training.warmup_steps, config.training.warmup_ratio) == expected


def test_one_layer_gives_warm_up_once() -> None:
    [problem] = problems(Layer(FLAGS, {"warmup_steps": "10", "warmup_ratio": "0.1"}))
    assert "--warmup_steps and --warmup_ratio" in problem
    assert FLAGS in problem


@pytest.mark.parametrize("name", ["default.yaml", "preset.yaml", "regime.yaml"])
def test_values_of_a_file_are_given_whatever_its_name(name: str) -> None:
    config = resolve("scratch", [Layer(name, {"epochs": 2})])
    assert config.is_given("epochs")
    assert not config.is_given("seed")


# What is wrong


def test_all_problems_are_reported_at_once_each_with_its_place() -> None:
    found = problems(
        Layer("my.yaml", {"lerning_rate": 1, "batch_size": "many"}),
        Layer(FLAGS, {"num_layer": "3", "epochs": "0", "precision": "bf8", "dropout": "1.5"}),
    )
    expected = {
        "lerning_rate": ("my.yaml", "learning_rate?"),
        "--num_layer": ("--num_layer;", "num_layers?"),
        "--batch_size many": ("from my.yaml", "integer"),
        "--epochs 0": ("set on the command line", "greater than 0"),
        "--precision bf8": ("set on the command line", "'fp32'"),
        "--dropout 1.5": ("set on the command line", "less than 1"),
    }
    assert len(found) == len(expected)
    for name, words in expected.items():
        [line] = [line for line in found if name in line.partition(";")[0]]
        assert all(word in line for word in words), line


def test_an_unknown_name_without_a_likeness_gets_no_guess() -> None:
    [problem] = problems(Layer(FLAGS, {"xyzzy": ""}))
    assert problem == "unknown option --xyzzy"


def test_an_unknown_preset_is_answered_with_the_nearest_and_all() -> None:
    [problem] = problems(Layer(FLAGS, {"model": "gpt2-medum"}))
    assert "--model gpt2-medum (set on the command line)" in problem
    assert "did you mean gpt2-medium?" in problem
    assert all(name in problem for name in preset_names())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", True, "expected a number, not yes or no"),
        ("learning_rate", False, "expected a number, not yes or no"),
        ("seed", True, "expected a number, not yes or no"),
        ("num_layers", True, "expected a number, not yes or no"),
        ("batch_size", "eight", "integer"),
        ("batch_size", 2.5, "integer"),
        ("batch_size", [8], "integer"),
        ("packing", "perhaps", "boolean"),
        ("packing", 2, "boolean"),
        ("data", 7, "string"),
        ("data", True, "string"),
        ("max_training_hours", float("nan"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("max_seq_len", 1, "greater than or equal to 2"),
    ],
)
def test_wrong_types_in_a_file(name: str, value: Any, words: str) -> None:
    [problem] = problems(Layer("my.yaml", {name: value}))
    assert f"--{name} {value} (from my.yaml)" in problem
    assert words in problem


def test_numbers_written_as_text_in_yaml_are_numbers() -> None:
    # YAML 1.1 reads 3e-4, without a point, as text.
    assert yaml.safe_load("learning_rate: 3e-4") == {"learning_rate": "3e-4"}
    assert resolve("scratch", [Layer("my.yaml", {"learning_rate": "3e-4"})]).training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_lr": "1e-2", "learning_rate": "1e-3"}, ("--min_lr 0.01", "above", "--learning_rate 0.001")),
        ({"lr_schedule": "constant", "min_lr": "1e-5"}, ("--min_lr", "constant")),
        ({"val_data": "b.txt", "val_split": "0.2"}, ("--val_split 0.2", "--val_data b.txt")),
        ({"tokenizer": "char", "vocab_size": "300"}, ("--vocab_size 300", "--tokenizer char")),
        ({"optimizer": "sgd", "beta2": "0.9"}, ("--beta2 0.9", "sgd")),
    ],
)
def test_contradictions_name_both_sides(values: dict[str, str], words: tuple[str, ...]) -> None:
    [problem] = problems(Layer(FLAGS, values))
    assert all(word in problem for word in words), problem


def test_contradictions_come_with_unknown_names() -> None:
    found = problems(Layer(FLAGS, {"min_lr": "1", "learning_rate": "0.1", "sede": "1"}))
    assert len(found) == 2


# Files


def test_a_file_may_use_hyphens_and_sources_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning-rate: 0.001\nsources: {learning_rate: x}\n", encoding="utf-8")
    assert read_config_file(str(path)) == Layer(str(path), {"learning_rate": 0.001})


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", "a: [1,\n", "1: 2\n"])
def test_a_file_that_is_not_a_list_of_names_and_values(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--config .*run\.yaml"):
        read_config_file(str(path))


@pytest.mark.parametrize("content", ["epochs: 1\nseed: 2\nepochs: 3\n", "seed: 0\n\nepochs: 1\n# *a\nseed: 1\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line [35]: (epochs|seed) stands on line 1 too; leave one out"):
        read_config_file(str(path))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        read_config_file(str(path))


def test_no_such_file_or_preset_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"no such file, and no preset of that name.*gpt2-medium"):
        read_config_file("nowhere.yaml")


def test_what_to_yaml_writes_is_read_back_the_same(tmp_path: Path) -> None:
    config = flags(model="tiny", data="book.txt", learning_rate="5e-4", warmup_steps="7", packing=False)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = resolve("scratch", [read_config_file(str(path))])
    assert again.values() == config.values()
    written = yaml.safe_load(config.to_yaml())
    assert written["sources"]["learning_rate"] == FLAGS
    assert list(written)[1:-1] == option_names("scratch")


# Fine-tuning: whole, or with adapters


def tuning(**values: Any) -> Config:
    return resolve("finetune", [Layer(FLAGS, {"model": "gpt2", **values})])


def tuning_problems(*layers: Layer) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve("finetune", list(layers))
    return caught.value.problems


@pytest.mark.parametrize(
    ("values", "regime", "learning_rate"),
    [
        ({}, "finetune", 2e-5),
        ({"lora": True}, "lora", 2e-4),
        ({"lora": False}, "finetune", 2e-5),
        ({"lora_r": "8"}, "lora", 2e-4),
        ({"lora_embeddings": True, "lora": True}, "lora", 2e-4),
        ({"last_blocks": "2"}, "finetune", 2e-5),
        ({"lora_dropout": "0.1", "learning_rate": "1e-3"}, "lora", 1e-3),
    ],
)
def test_what_is_given_decides_the_regime(values: dict[str, Any], regime: str, learning_rate: float) -> None:
    config = tuning(**values)
    assert (config.regime, config.training.learning_rate) == (regime, learning_rate)
    assert list(config.values()) == option_names(regime)
    if "learning_rate" not in values:
        assert config.sources["learning_rate"] == f"regime {regime}"


def test_a_stronger_layer_turns_lora_off_or_on() -> None:
    file = Layer("my.yaml", {"model": "gpt2", "lora": True})
    assert resolve("finetune", [file]).regime == "lora"
    assert resolve("finetune", [file, Layer(FLAGS, {"lora": False})]).regime == "finetune"
    assert resolve("finetune", [Layer("my.yaml", {"lora_r": 8}), Layer(FLAGS, {"model": "gpt2"})]).regime == "lora"
    off = Layer("my.yaml", {"lora": False, "model": "gpt2"})
    assert resolve("finetune", [off, Layer(FLAGS, {"lora": True})]).regime == "lora"


@pytest.mark.parametrize("values", [{}, {"lora": True}, {"lora_r": "8"}, {"last_blocks": "1", "freeze": "norms"}])
def test_the_config_of_a_run_means_the_same_run(values: dict[str, Any], tmp_path: Path) -> None:
    """It lists every option, also those of adapters that nobody chose."""
    config = tuning(
        data="a.json", add_tokens=("<|a|>",) if not any("lora" in name for name in values) else (), **values
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = resolve("finetune", [read_config_file(str(path))])
    assert (again.regime, again.values()) == (config.regime, config.values())


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_name_brings_no_preset(name: str) -> None:
    config = tuning(model=name)
    assert not any(source.startswith("preset") for source in config.sources.values())
    assert config.model.d_model is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora": False, "lora_r": "4"}, ("--lora_r 4", "no meaning without --lora")),
        ({"lora": False, "lora_alpha": "8"}, ("--lora_alpha 8.0", "add --lora")),
        ({"base_precision": "nf4"}, ("--base_precision nf4", "add --lora")),
        ({"lora": True, "freeze": "mlp"}, ("--freeze mlp", "contradicts --lora", "--lora_targets")),
        ({"lora": True, "add_tokens": ("<|a|>",)}, ("--add_tokens", "--lora_embeddings")),
        ({"model": ""}, ("--model is missing", "HuggingFaceTB/SmolLM2-135M")),
        ({"tokenizer": "bpe"}, ("--tokenizer bpe", "its own tokenizer", "leave it out")),
        ({"arch": "llama"}, ("--arch has no meaning when fine-tuning",)),
        ({"d_model": "64"}, ("--d_model has no meaning when fine-tuning",)),
        ({"lora": True, "num_layers": "6"}, ("--num_layers has no meaning when fine-tuning",)),
        ({"lora_rank": "6"}, ("unknown option --lora_rank",)),
        ({"lora_targtes": "6"}, ("unknown option --lora_targtes; did you mean lora_targets?",)),
        ({"lora_r": "0"}, ("--lora_r 0", "greater than 0")),
        ({"lora_dropout": "1"}, ("--lora_dropout 1", "less than 1")),
        ({"last_blocks": "0"}, ("--last_blocks 0", "greater than 0")),
        ({"base_precision": "int8"}, ("--base_precision int8", "'nf4'")),
        ({"format": "sharegpt"}, ("--format sharegpt", "'chat'")),
    ],
)
def test_what_cannot_be_fine_tuned(values: dict[str, Any], words: tuple[str, ...]) -> None:
    [problem] = tuning_problems(Layer(FLAGS, {"model": "gpt2", **values}))
    assert all(word in problem for word in words), problem


def test_a_model_must_be_named_to_fine_tune() -> None:
    [problem] = tuning_problems(Layer(FLAGS, {"data": "a.json"}))
    assert "--model is missing" in problem


@pytest.mark.parametrize("name", ["lora", "lora_r", "last_blocks", "freeze", "add_tokens", "base_precision"])
def test_options_of_fine_tuning_mean_nothing_from_scratch(name: str) -> None:
    [problem] = problems(Layer(FLAGS, {"model": "tiny", name: "1"}))
    assert problem == f"--{name} has no meaning when training from scratch; leave it out"
    [problem] = problems(Layer("my.yaml", {"model": "tiny", name: "1"}))
    assert problem == f"{name} in my.yaml has no meaning when training from scratch; leave it out"


# Continuing


def continuing(**values: Any) -> Config:
    return resolve("continue", [Layer(FLAGS, {"model": "m", "data": "a.txt", "domain": "law", **values})])


def continuing_problems(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        continuing(**values)
    return caught.value.problems


def test_lora_changes_the_regime_of_continuing() -> None:
    assert continuing().regime == "continue" and not continuing().with_lora
    config = continuing(lora_r="4")
    assert (config.regime, config.with_lora, config.continues) == ("continue-lora", True, True)
    assert config.training.learning_rate == 2e-4


def test_options_of_continuing_come_back_from_a_run(tmp_path: Path) -> None:
    config = continuing(replay="0.1", method="replay,kl", max_forgetting="0.02")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = resolve("continue", [read_config_file(str(tmp_path / "config.yaml"))])
    assert again.values() == config.values()
    assert list(config.values()) == option_names("continue")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"domain": None}, ("--domain is missing", "--domain medical")),
        ({"domain": "a/b"}, ("--domain a/b", "letters, digits")),
        ({"domain": "../up"}, ("--domain ../up", "letters, digits")),
        ({"domain": "x" * 65}, ("at most 64",)),
        ({"replay": "1"}, ("--replay 1", "less than 1")),
        ({"replay": "-0.1"}, ("--replay -0.1", "greater than or equal to 0")),
        ({"replay": "0.5", "self_replay": "0.5"}, ("--replay 0.5", "--self_replay 0.5", "nothing for the new text")),
        ({"method": "reply"}, ("--method reply", "did you mean replay?")),
        ({"method": "auto,kl"}, ("--method auto,kl", "auto stands alone")),
        ({"method": "naive", "replay": "0.1"}, ("--method naive", "contradicts --replay 0.1")),
        ({"method": "replay", "replay": "0"}, ("--method replay", "contradicts --replay 0.0")),
        ({"on_forgetting": "stop"}, ("--on_forgetting stop", "without --max_forgetting")),
        ({"max_forgetting": "-1"}, ("--max_forgetting -1",)),
        ({"lora": True, "l2_sp": "0.1"}, ("--l2_sp has no meaning with --lora",)),
        ({"lora": True, "method": "ewc"}, ("--ewc has no meaning with --lora",)),
        ({"lora_dora": True, "interpolate": True}, ("--interpolate has no meaning with --lora_dora",)),
        ({"arch": "llama"}, ("--arch has no meaning when continuing",)),
    ],
)
def test_what_cannot_be_continued(values: dict[str, Any], words: tuple[str, ...]) -> None:
    [problem] = continuing_problems(**values)
    assert all(word in problem for word in words), problem


def test_going_back_needs_no_domain() -> None:
    assert continuing(domain=None, data=None, rollback_to="law").keeping.rollback_to == "law"


@pytest.mark.parametrize("name", ["domain", "replay", "method", "max_forgetting"])
def test_options_of_continuing_mean_nothing_in_fine_tuning(name: str) -> None:
    [problem] = tuning_problems(Layer(FLAGS, {"model": "gpt2", name: "1"}))
    assert problem == f"--{name} has no meaning when fine-tuning pretrained weights; leave it out"


# Paths that begin at home


@pytest.mark.parametrize("name", ["model", "tokenizer", "output", "resume_from"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/m", "HOME/m"),
        ("~", "HOME"),
        ("~nobody.here/m", "~nobody.here/m"),
        ("owner/name", "owner/name"),
        ("a~", "a~"),
    ],
)
def test_a_leading_tilde_is_the_home_folder(
    name: str, given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"data": "b.txt", "model": "owner/model", name: given}
    config = resolve("finetune", [Layer("my.yaml", values)])
    assert config.values()[name] == meant.replace("HOME", str(tmp_path))


def test_a_shape_a_file_and_a_run_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    config = flags(model="~/config.json", learning_rate=1e-3)
    assert config.model.model == str(tmp_path)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert read_config_file("~/config.yaml").values["model"] == str(tmp_path)
    run = read_run_options("scratch", "~")
    assert (run.values["learning_rate"], run.run) == (1e-3, str(tmp_path))
