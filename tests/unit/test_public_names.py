"""The names that other people's programs rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import seedbed

PUBLIC = [
    "Evaluation",
    "LanguageModel",
    "Run",
    "SeedbedError",
    "Trainer",
    "continue_training",
    "finetune",
    "load",
    "pretrain",
]
"""Adding a name is a line here; removing or renaming one breaks somebody's program."""

METHODS = {
    "LanguageModel": ["chat", "evaluate", "generate"],
    "Run": ["load"],
    "Trainer": ["evaluate", "generate", "load_model", "train"],
    "Evaluation": ["bits_per_byte", "nats_per_token", "to_json", "token_ppl", "word_ppl"],
}


def test_the_public_names() -> None:
    assert seedbed.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


def test_they_are_listed() -> None:
    assert set(PUBLIC) <= set(dir(seedbed))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_is_there_and_documented(name: str) -> None:
    value = getattr(seedbed, name)
    assert inspect.getdoc(value)
    assert not (inspect.getdoc(value) or "").startswith(f"{name}("), "a dataclass without a docstring of its own"
    assert (value.__module__ or "").startswith("seedbed.")


@pytest.mark.parametrize("name", METHODS)
def test_public_methods(name: str) -> None:
    kind = getattr(seedbed, name)
    fields = set(getattr(kind, "__dataclass_fields__", {}))
    public = {key for key in vars(kind) if not key.startswith("_")} - fields
    assert sorted(public) == METHODS[name]
    for method in METHODS[name]:
        assert inspect.getdoc(getattr(kind, method)), f"{name}.{method}"


def test_options_of_functions() -> None:
    for train in (seedbed.pretrain, seedbed.finetune):
        assert list(inspect.signature(train).parameters) == ["from_run", "config", "quiet", "options"]
    assert list(inspect.signature(seedbed.load).parameters) == ["path", "device", "precision"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        seedbed.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_every_error_is_a_seedbed_error_with_its_exit_code() -> None:
    from seedbed import errors

    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__]
    assert all(issubclass(kind, seedbed.SeedbedError) for kind in kinds)
    assert {kind.__name__: getattr(kind, "exit_code", None) for kind in kinds} == {
        "SeedbedError": 1,
        "ConfigError": 2,
        "MissingExtra": 2,
        "DataError": 3,
        "TooLittleTextError": 3,
        "CheckpointError": 4,
        "RunInUseError": 5,
        "DivergedError": 6,
        "OutOfMemoryError": 7,
        "StorageError": 8,
        "JudgeError": 2,
        "LostProcessError": 1,
    }


def test_importing_the_package_is_quick() -> None:
    check = "import sys, seedbed; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
