"""Intervals of means over seeds."""

from __future__ import annotations

import math

import pytest

from isotune.intervals import Mean, half_width, quantile


def test_the_interval_is_students() -> None:
    # 4.3027 x 0.1 / sqrt(3), with the sample's standard deviation.
    assert half_width([0.7, 0.8, 0.9]) == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.706), (9, 2.262), (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, table: float) -> None:
    assert quantile(freedom) == pytest.approx(table, abs=1e-3)


def test_a_single_value_has_no_interval() -> None:
    assert Mean.of([0.5]).as_dict() == {"values": [0.5], "mean": 0.5, "half_width": None}
