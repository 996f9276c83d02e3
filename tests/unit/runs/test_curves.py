"""Curves of runs at common points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from seedbed.runs.curves import MOST_POINTS, Axis, align
from seedbed.runs.series import Series


def series(steps: Sequence[float], values: Sequence[float], tokens_a_step: float = 10.0) -> Series:
    step = np.array(steps, dtype=float)
    return Series(step, step / 100, step * tokens_a_step, step / 1000, np.array(values, dtype=float))


def test_validation_is_interpolated_where_every_run_has_been() -> None:
    coarse = {"val_loss": series([10, 20, 30], [3.0, 2.0, 1.0])}
    fine = {"val_loss": series([5, 15, 25], [4.0, 2.0, 1.0])}
    [curve] = align([coarse, fine], "step")
    assert curve.name == "val_loss"
    assert curve.points == (10.0, 20.0)
    assert curve.values == ((3.0, 2.0), (3.0, 1.5))


@pytest.mark.parametrize(("axis", "unit"), [("step", 1), ("tokens", 10), ("time", 0.001), ("epoch", 0.01)])
def test_every_axis(axis: Axis, unit: float) -> None:
    run = {"val_loss": series([10, 20], [3.0, 2.0])}
    [curve] = align([run, run], axis)
    assert curve.points == pytest.approx((10 * unit, 20 * unit))


def test_runs_with_larger_steps_meet_by_tokens() -> None:
    small = {"val_loss": series([10, 20, 40], [3.0, 2.0, 1.0], tokens_a_step=10)}
    large = {"val_loss": series([5, 10, 20], [2.9, 1.9, 0.9], tokens_a_step=20)}
    [curve] = align([small, large], "tokens")
    assert curve.points == (100.0, 200.0, 400.0)
    assert curve.values[1] == (2.9, 1.9, 0.9)


def test_training_loss_is_a_mean_of_the_steps_before() -> None:
    steps = [float(step) for step in range(1, 201)]
    run = {"val_loss": series([100, 200], [1.0, 1.0]), "train_loss": series(steps, steps)}
    curve = align([run, run], "step")[1]
    assert curve.name == "train_loss"
    assert curve.values[0] == pytest.approx((75.5, 175.5))


def test_a_run_without_figures_does_not_hide_the_others() -> None:
    run = {"val_loss": series([10, 20], [3.0, 2.0])}
    [curve] = align([run, {}, run], "step")
    assert curve.values == ((3.0, 2.0), (), (3.0, 2.0))
    assert align([{}, {}], "step") == []
    training = {"train_loss": series([1, 2, 3], [3.0, 2.0, 1.0])}
    assert [curve.name for curve in align([training, training], "step")] == ["train_loss"]


def test_runs_that_never_met_have_no_points() -> None:
    early, late = ({"val_loss": series(steps, [2.0, 1.0])} for steps in ([1, 2], [3, 4]))
    assert align([early, late], "step") == []
    around, within = ({"val_loss": series(steps, [2.0, 1.0, 1.5])} for steps in ([1, 100, 101], [40, 50, 60]))
    [curve] = align([around, within], "step")
    assert (curve.points[0], curve.points[-1]) == (40.0, 60.0)


def test_only_a_handful_of_points() -> None:
    steps = [float(step) for step in range(0, 1000, 10)]
    run = {"val_loss": series(steps, steps)}
    [curve] = align([run, run], "step")
    assert len(curve.points) == MOST_POINTS
    assert (curve.points[0], curve.points[-1]) == (0.0, 990.0)
