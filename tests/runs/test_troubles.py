"""What `diagnose` says of real runs: some of the troubles in examples/troubles, and sound runs.

All of them, and how often each rule is right, are in benchmarks/diagnosis.py: minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from seedbed.runs.diagnose import NAMES, diagnose

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from diagnosis import TEXTS, make_run, read_recipes, texts_of, write_texts

QUICK = ("nan", "under_training", "long_warmup", "plateau", "learning_rate_too_low", "overfitting")
SOUND = ("scratch", "gpt2-linear", "qwen3-wsd", "accumulation-one-epoch")

RECIPES = {recipe.name: recipe for recipe in read_recipes()}


@pytest.fixture(scope="module")
def run_recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("troubles")
    write_texts([RECIPES[name] for name in (*QUICK, *SOUND)], folder)
    return lambda name: make_run(RECIPES[name], folder)


@pytest.mark.parametrize("name", QUICK)
def test_trouble_is_named(name: str, run_recipe: Callable[[str], Path]) -> None:
    found = [finding.name for finding in diagnose(run_recipe(name))]

    assert RECIPES[name].expect in found


@pytest.mark.parametrize("name", SOUND)
def test_sound_run_has_nothing_above_a_note(name: str, run_recipe: Callable[[str], Path]) -> None:
    found = [f"{finding}" for finding in diagnose(run_recipe(name)) if finding.level != "note"]

    assert found == []


def test_every_rule_has_a_run_that_shows_it() -> None:
    assert {recipe.expect for recipe in RECIPES.values() if recipe.expect} == set(NAMES)


def test_every_text_of_a_recipe_can_be_written() -> None:
    assert set(texts_of(RECIPES.values())) == set(TEXTS)
