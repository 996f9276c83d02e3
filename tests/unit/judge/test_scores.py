"""Intervals agree with theory where there is one; a preference counts only in both orders."""

from __future__ import annotations

import math

import numpy as np
import pytest

from seedbed.judge import scores as module
from seedbed.judge.prompts import VERDICTS
from seedbed.judge.scores import differences, estimate, is_inconsistent, outcome, spread


def test_the_interval_of_many_values_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(50, 20, 500).tolist()
    found = estimate(values)
    assert found is not None and found.low is not None and found.high is not None
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - half, abs=half * 0.05)
    assert found.high == pytest.approx(found.mean + half, abs=half * 0.05)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    found = [estimate(rng.beta(0.5, 0.5, 40).tolist()) for _ in range(100)]
    inside = sum(one is not None and one.low is not None and one.low <= 0.5 <= (one.high or 0) for one in found)
    assert 88 <= inside <= 100


def test_the_same_values_give_the_same_interval_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(value) for value in range(30)]
    first = estimate(values)
    assert estimate(values) == first
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    again = estimate(values)
    assert first is not None and again is not None and first.low is not None
    assert again.low == pytest.approx(first.low, abs=0.3)


def test_few_values() -> None:
    assert estimate([]) is None
    one = estimate([40.0])
    assert one is not None and (one.mean, one.low, one.high) == (40.0, None, None)
    same = estimate([7.0] * 5)
    assert same is not None and (same.low, same.high) == (7.0, 7.0)


def test_pairs_say_more_than_two_means() -> None:
    rng = np.random.default_rng(3)
    hard = rng.uniform(0, 90, 60)  # how hard a question is counts more than which model answers
    a = {str(place): float(value) + 5 for place, value in enumerate(hard)}
    b = {str(place): float(value) + rng.normal(0, 1) for place, value in enumerate(hard)}
    paired = estimate(differences(a, b))
    alone = estimate(list(a.values()))
    assert paired is not None and paired.low is not None and alone is not None and alone.low is not None
    assert 4 < paired.low < paired.mean < 6
    assert alone.mean - alone.low > 4


def test_differences_are_of_questions_that_both_have() -> None:
    assert differences({"a": 5.0, "b": 1.0}, {"b": 3.0, "c": 9.0}) == [-2.0]


def test_spread_is_between_repeats() -> None:
    assert spread([[10.0], [20.0]]) is None
    assert spread([[10.0, 20.0], [50.0, 50.0], [1.0]]) == pytest.approx(math.sqrt(50) / 2)


def test_a_preference_counts_only_in_both_orders() -> None:
    outcomes = {(first, swapped): outcome(first, swapped) for first in VERDICTS for swapped in VERDICTS}
    assert [pair for pair, result in outcomes.items() if result == "win"] == [("A", "B")]
    assert [pair for pair, result in outcomes.items() if result == "loss"] == [("B", "A")]
    consistent = [pair for pair in outcomes if not is_inconsistent(*pair)]
    assert consistent == [("A", "B"), ("B", "A"), ("tie", "tie")]
