from __future__ import annotations

import math
import random

import pytest

from seedbed.train.guard import ENOUGH, Guard


def usual(steps: int = 64) -> Guard:
    """What noisy, sound training leaves behind."""
    choose = random.Random(0)
    return Guard([3 + choose.gauss(0, 0.1) for _ in range(steps)], [1 + choose.gauss(0, 0.2) for _ in range(steps)])


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_refused_from_the_first_step(loss: float, norm: float) -> None:
    assert Guard().objection(loss, norm) == "non-finite loss or gradient"


def test_what_explodes_is_refused() -> None:
    assert usual().objection(3000.0, 1.0).startswith("the loss exploded: 3000, usual ")
    assert usual().objection(3.0, 1000.0).startswith("the gradient exploded: norm 1000, usual ")


@pytest.mark.parametrize(("loss", "norm"), [(3.5, 1.2), (4.9, 5.0), (2.0, 60.0)])
def test_noise_and_hard_rows_are_not(loss: float, norm: float) -> None:
    assert usual().objection(loss, norm) == ""


def test_a_hard_row_after_a_text_learnt_by_heart_is_learnt() -> None:
    assert Guard([0.01] * 64, [0.05] * 64).objection(1.9, 4.0) == ""


def test_nothing_explodes_before_something_is_usual() -> None:
    assert usual(ENOUGH - 1).objection(1e6, 1e6) == ""


def test_what_was_refused_does_not_change_what_is_usual() -> None:
    """Ten times no number, then a sound step at once; ten explosions, and the next is still one."""
    guard = usual()
    for _ in range(10):
        assert guard.objection(math.nan, math.nan)
        assert guard.objection(1e9, 1e9)
    assert guard.objection(3.0, 1.0) == ""
    assert guard.objection(3000.0, 1.0)


def test_a_rise_that_is_slow_is_followed() -> None:
    guard = usual()
    for step in range(200):
        loss = 3.0 * 1.01**step
        assert guard.objection(loss, 1.0) == "", step
        guard.taken(loss, 1.0)
