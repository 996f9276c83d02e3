from __future__ import annotations

import math
import random
from typing import Any

import pytest

from seedbed.schedule import Schedule
from seedbed.train.stopping import Stopwatch


def schedule(kind: Any = "cosine", **changes: Any) -> Schedule:
    values = {"peak": 1e-3, "minimum": 1e-4, "warmup_steps": 10, "warmup_ratio": 0.0, "total_steps": 110}
    return Schedule(kind=kind, **{**values, **changes})


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_peak_times_step_over_warmup(kind: str) -> None:
    s = schedule(kind)
    assert [s.at(step) for step in (1, 5, 9)] == pytest.approx([1e-4, 5e-4, 9e-4])
    assert s.at(10) == pytest.approx(1e-3)


def test_cosine_is_the_written_formula() -> None:
    s = schedule()
    for step in range(10, 111):
        progress = (step - 10) / 100
        assert s.at(step) == pytest.approx(1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * progress)))
    assert s.at(60) == pytest.approx((1e-3 + 1e-4) / 2)
    assert s.at(110) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("linear", {10: 1e-3, 35: 1e-4 + 9e-4 * 0.75, 60: 1e-4 + 9e-4 * 0.5, 110: 1e-4}),
        ("constant", {10: 1e-3, 60: 1e-3, 110: 1e-3}),
        # The last fifth of the hundred steps after warm-up.
        ("wsd", {10: 1e-3, 90: 1e-3, 100: 1e-4 + 9e-4 * 0.5, 110: 1e-4}),
    ],
)
def test_the_other_kinds_at_key_points(kind: str, points: dict[int, float]) -> None:
    for step, expected in points.items():
        assert schedule(kind).at(step) == pytest.approx(expected), step


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_after_the_end_it_stays_at_the_minimum(kind: str) -> None:
    assert schedule(kind).at(500) == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "cosine_time"])
def test_without_warm_up_the_first_step_is_near_the_peak(kind: str) -> None:
    assert schedule(kind, warmup_steps=0).at(1) == pytest.approx(1e-3, rel=0.02)


def test_warm_up_as_long_as_the_run_still_has_a_value_at_every_step() -> None:
    s = schedule(warmup_steps=110)
    assert [s.at(step) for step in (1, 55, 110)] == pytest.approx([1e-3 / 110, 5e-4, 1e-3])


# Time-budget decay, on a clock whose steps take anything between nothing and three seconds

HOURS = 0.1


class NoisyClock:
    def __init__(self, seed: int, start: float = 0.0) -> None:
        self._random = random.Random(seed)
        self.now = start

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        stall = 20.0 if self._random.random() < 0.02 else 0.0
        self.now += self._random.expovariate(1.0) + stall


def run_until_the_hours_are_gone(s: Schedule, clock: NoisyClock) -> list[tuple[float, float]]:
    watch = Stopwatch(0.0, HOURS, clock)
    curve: list[tuple[float, float]] = []
    while watch.seconds_left > 0:
        step = len(curve) + 1
        curve.append((watch.share_used, s.at(step, watch.share_used)))
        clock.step()
    curve.append((watch.share_used, s.at(len(curve) + 1, watch.share_used)))
    return curve


@pytest.mark.parametrize("seed", range(5))
def test_time_decay_only_falls_after_warm_up_and_ends_at_the_minimum(seed: int) -> None:
    s = schedule("cosine_time", warmup_steps=0, warmup_ratio=0.1, total_steps=None)
    curve = run_until_the_hours_are_gone(s, NoisyClock(seed))
    assert len(curve) > 100
    rates = [rate for _, rate in curve]
    rising = [rate for used, rate in curve if used < 0.1]
    falling = [rate for used, rate in curve if used >= 0.1]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(rates) <= 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    assert max(rates) > 0.9e-3


@pytest.mark.parametrize("seed", range(5))
def test_time_decay_follows_the_share_of_the_hours_not_the_steps(seed: int) -> None:
    s = schedule("cosine_time", warmup_steps=0, warmup_ratio=0.0, total_steps=None)
    for used, rate in run_until_the_hours_are_gone(s, NoisyClock(seed)):
        assert rate == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * used)))


def test_a_resumed_stopwatch_goes_on_along_the_same_curve() -> None:
    """A sitting that ends with 200 s used and one that begins with 200 s used meet in one point."""
    s = schedule("cosine_time", warmup_steps=0, warmup_ratio=0.05, total_steps=None)
    clock = NoisyClock(0, start=5000.0)
    whole = Stopwatch(0.0, HOURS, clock)
    clock.now += 200.0
    resumed = Stopwatch(whole.seconds, HOURS, NoisyClock(1, start=77.0))
    assert resumed.share_used == pytest.approx(whole.share_used)
    assert s.at(123, resumed.share_used) == pytest.approx(s.at(123, whole.share_used))
    # More hours after a time limit stretch what is left, and never fall below the minimum.
    longer = Stopwatch(200.0, 2 * HOURS, NoisyClock(1))
    assert s.at(123, longer.share_used) > s.at(123, whole.share_used)


def test_time_decay_with_a_number_of_steps_ends_at_whichever_comes_first() -> None:
    s = schedule("cosine_time", warmup_steps=0, total_steps=100)
    assert s.at(100, 0.3) == pytest.approx(1e-4)
    assert s.at(10, 1.0) == pytest.approx(1e-4)
    assert s.at(50, 0.1) == pytest.approx(s.at(10, 0.5))


def test_time_decay_can_warm_up_in_steps() -> None:
    s = schedule("cosine_time", warmup_steps=10, total_steps=None)
    assert s.at(5, 0.01) == pytest.approx(5e-4)
    assert s.at(10, 0.0) == pytest.approx(1e-3)


def test_a_stopwatch_counts_earlier_sittings() -> None:
    clock = NoisyClock(0)
    watch = Stopwatch(100.0, HOURS, clock)
    clock.now = 60.0
    assert (watch.seconds, watch.seconds_left) == (160.0, 200.0)
    assert watch.hours == pytest.approx(160 / 3600)
    clock.now = 1e6
    assert (watch.seconds_left, watch.share_used) == (0.0, 1.0)
