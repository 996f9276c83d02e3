"""Student's t and Welch's interval, against published figures."""

from __future__ import annotations

import pytest

from seedbed.runs.noise import difference, t_quantile

T = {
    1: 12.7062047,
    1.5: 6.0166631,
    2: 4.3026527,
    2.5: 3.5746548,
    3: 3.1824463,
    4: 2.7764451,
    10: 2.2281389,
    30: 2.0422725,
    120: 1.9799304,
}
"""Quantiles of Student's distribution by degrees of freedom: of printed tables, and between them by mpmath."""


@pytest.mark.parametrize(("freedom", "t"), T.items())
def test_t_is_that_of_the_tables(freedom: float, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, rel=2e-6)


def test_welch() -> None:
    """Reckoned with mpmath: 3.640175 degrees of freedom, t 2.888104."""
    found = difference([0.8031, 0.8024, 0.8037, 0.8050], [0.7837, 0.7858, 0.7865])
    assert found.mean == pytest.approx(0.0182166667)
    assert found.half_width == pytest.approx(0.0029053013)
    assert found.exceeds_noise


def test_equal_variances_give_the_pooled_interval() -> None:
    found = difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert found.half_width == pytest.approx(2.77645 * (2 / 3) ** 0.5, rel=1e-5)
    assert found.exceeds_noise is False


def test_one_sample_lends_the_other_its_deviation() -> None:
    found = difference([1.0, 1.2, 1.4], [2.0])
    assert found.half_width == pytest.approx(4.30265 * 0.2 * (1 / 3 + 1) ** 0.5, rel=1e-5)
    assert difference([2.0], [1.0, 1.2, 1.4]).half_width == pytest.approx(found.half_width)


def test_without_seeds_nothing_is_claimed() -> None:
    assert difference([1.0], [2.0]).exceeds_noise is None
    assert difference([1.0, 1.0], [1.0, 1.0]).exceeds_noise is False
    assert difference([1.0, 1.0], [2.0, 2.0]).exceeds_noise is True
