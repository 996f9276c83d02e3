"""Filters and sorting of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from seedbed.errors import ConfigError
from seedbed.runs.info import RunInfo
from seedbed.runs.query import select
from tests.unit.runs.folders import write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunInfo]:
    return [
        write_run(tmp_path / "a", {"learning_rate": 5e-5, "packing": False}, {"best_val_loss": 2.0, "notes": "Good"}),
        write_run(tmp_path / "b", {"learning_rate": 1e-4, "lora_r": 8}, {"best_val_loss": None, "parameters": 99}),
        write_run(tmp_path / "c", {"learning_rate": 2e-4}, {"best_val_loss": 1.5, "judge": {"score": 40.0}}),
    ]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["lr<1e-4"], "a"),
        (["learning_rate <= 0.0001"], "ab"),
        (["lr=0.00005"], "a"),
        (["method=LoRA"], "b"),
        (["method!=lora"], "ac"),
        (["parameters>100M"], "ac"),
        (["parameters=135M"], "ac"),
        (["val_loss<9"], "ac"),
        (["val_loss="], "b"),
        (["val_loss!="], "ac"),
        (["packing=false"], "a"),
        (["packing=on"], "bc"),
        (["notes~goo"], "a"),
        (["judge>=40"], "c"),
        (["model~base", "lr>6e-5", "rank!=8"], "c"),
        (["status=done"], "abc"),
        (["notes<3"], ""),
    ],
)
def test_filters(runs: list[RunInfo], filters: list[str], names: str) -> None:
    assert "".join(run.name for run in select(runs, filters)) == names


@pytest.mark.parametrize(
    ("sort", "names"),
    [("val_loss", "cab"), ("-val_loss", "acb"), ("-lr", "cba"), ("learning_rate", "abc"), ("notes", "abc")],
)
def test_sorting_puts_the_unknown_last(runs: list[RunInfo], sort: str, names: str) -> None:
    assert "".join(run.name for run in select(runs, [], sort)) == names


def test_all_that_is_wrong_is_said_at_once(runs: list[RunInfo]) -> None:
    with pytest.raises(ConfigError) as caught:
        select(runs, ["lr", "lerning_rate=1", "lr<low", "status=done"], "-vall_oss")
    assert [problem.partition(":")[2] for problem in caught.value.problems[:3]] == [
        " expected NAME, one of = != < <= > >= ~, VALUE, such as 'lr<1e-4'",
        " no column or option is called lerning_rate; did you mean learning_rate?",
        " expected a number after <",
    ]
    assert "did you mean val_loss?" in caught.value.problems[3]
    assert select([], ["anything=1"], "anything") == []
