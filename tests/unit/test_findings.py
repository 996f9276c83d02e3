from __future__ import annotations

import json

import pytest

from seedbed.errors import ConfigError
from seedbed.findings import Finding, Level, check_allowed, sift


def finding(name: str, level: Level) -> Finding:
    return Finding(name, level, f"{name} is odd", {"value": 3, "range": [1, 2]}, "Lower it.")


NOTE, WARNING, OTHER, ERROR = (
    finding("warmup", "note"),
    finding("learning_rate", "warning"),
    finding("epochs", "warning"),
    finding("all_masked", "error"),
)


def test_a_finding_reads_as_a_sentence_and_travels_as_json() -> None:
    assert str(WARNING) == "learning_rate is odd. Lower it."
    assert json.loads(json.dumps(WARNING.to_json())) == {
        "name": "learning_rate",
        "level": "warning",
        "message": "learning_rate is odd",
        "evidence": {"value": 3, "range": [1, 2]},
        "remedy": "Lower it.",
    }


def test_what_is_allowed_is_not_shown() -> None:
    assert sift([NOTE, WARNING, OTHER], strict=False, allow=()) == [NOTE, WARNING, OTHER]
    assert sift([NOTE, WARNING, OTHER], strict=False, allow=["learning_rate", "warmup"]) == [OTHER]


def test_strict_turns_all_warnings_into_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        sift([NOTE, WARNING, OTHER], strict=True, allow=())
    assert caught.value.problems == ["learning_rate is odd. Lower it.", "epochs is odd. Lower it."]
    assert sift([NOTE, WARNING], strict=True, allow=["learning_rate"]) == [NOTE]


def test_an_error_ends_the_run_even_when_it_is_allowed() -> None:
    with pytest.raises(ConfigError, match="all_masked is odd"):
        sift([WARNING, ERROR], strict=False, allow=["all_masked"])


def test_unknown_names_to_allow_are_all_reported() -> None:
    known = ["learning_rate", "epochs"]
    check_allowed(["epochs"], known)
    with pytest.raises(ConfigError) as caught:
        check_allowed(["lerning_rate", "epochs", "xyzzy"], known)
    assert caught.value.problems == [
        "--allow lerning_rate: no finding has this name; did you mean learning_rate?",
        "--allow xyzzy: no finding has this name",
    ]
