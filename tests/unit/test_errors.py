"""Errors that travel between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from seedbed.errors import ConfigError, DataError, MissingExtra, SeedbedError

ERRORS = [
    ConfigError("--epochs 0: expected more"),
    ConfigError(["--epochs 0: expected more", "unknown option x"]),
    MissingExtra("Parquet files", "parquet"),
    DataError("a.txt is empty"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_a_journey(error: SeedbedError) -> None:
    error.told = True
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert (other.exit_code, other.told) == (error.exit_code, True)
        assert getattr(other, "problems", None) == getattr(error, "problems", None)


def test_several_problems_stay_several() -> None:
    problems = ["one, of\ntwo lines", "another"]
    other = pickle.loads(pickle.dumps(ConfigError(problems)))  # noqa: S301
    assert other.problems == problems


def test_notes_go_along() -> None:
    error = DataError("a.txt is empty")
    error.add_note("seen at step 3")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen at step 3"]  # noqa: S301
