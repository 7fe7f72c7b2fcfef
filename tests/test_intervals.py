"""Intervals of means over seeds."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from isotune.intervals import Interval, half_width, paired, quantile, wilson


def test_the_interval_is_students() -> None:
    # 4.3027 x 0.1 / sqrt(3), with the sample's standard deviation.
    assert half_width([0.7, 0.8, 0.9]) == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.706), (9, 2.262), (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, table: float) -> None:
    assert quantile(freedom) == pytest.approx(table, abs=1e-3)


def test_a_single_value_has_no_interval() -> None:
    assert Interval.of([0.5]) == Interval(0.5, None, [0.5])


def test_a_difference_is_paired_by_seed_over_those_that_both_have() -> None:
    found = paired({1: 0.5, 2: 0.75, 3: 1.0}, {3: 0.5, 2: 0.5})
    assert found == Interval(0.375, half_width([0.25, 0.5]), [0.25, 0.5])
    assert paired({1: 0.5}, {2: 0.5}) is None


def test_only_an_interval_that_leaves_zero_out_excludes_it() -> None:
    assert [Interval(0.2, half).holds_zero for half in (0.1, 0.2, None)] == [False, True, True]
    assert -Interval(0.2, 0.1, [0.1, 0.3]) == Interval(-0.2, 0.1, [-0.1, -0.3])


def test_seeds_that_agree_to_a_row_leave_the_rows_own_uncertainty() -> None:
    ours, theirs = {1: 0.802, 2: 0.812}, {1: 0.800, 2: 0.810}  # a row of 500 each time
    plain, floored = paired(ours, theirs), paired(ours, theirs, rows=500)
    assert plain is not None
    assert floored is not None
    assert plain.half_width == pytest.approx(0, abs=1e-12)
    assert not plain.holds_zero
    assert floored.half_width == pytest.approx(1.96 * (0.002 / 500) ** 0.5, rel=2e-3)
    assert floored.holds_zero
    apart = {1: 0.9, 2: 0.5}  # where the seeds differ by more, they decide
    assert paired(apart, theirs, rows=500) == paired(apart, theirs)
    assert paired({1: 0.9}, theirs, rows=500) == paired({1: 0.9}, theirs)


def test_the_floor_is_what_redrawn_rows_would_show_at_the_least() -> None:
    """Two that disagree on as few rows as their difference allows, on rows drawn anew many times."""
    draw, rows, d = random.Random(0), 400, 0.03
    found = [sum(draw.random() < d for _ in range(rows)) / rows for _ in range(4000)]
    floored = paired({1: d, 2: d}, {1: 0.0, 2: 0.0}, rows=rows)
    assert floored is not None
    assert floored.half_width == pytest.approx(1.96 * statistics.stdev(found), rel=0.05)


@pytest.mark.parametrize(
    ("metric", "mean", "half", "ends"),
    [
        ("accuracy", 0.98, 0.05, (0.93, 1.0)),
        ("macro_f1", 0.02, 0.05, (0.0, 0.07)),
        ("probe_accuracy", 0.5, 0.1, (0.4, 0.6)),
        ("matthews", -0.1, 0.3, (-0.4, 0.2)),
        ("similarity", 0.9, 0.2, (0.7, 1.0)),
        ("loss", 0.1, 0.3, (0.0, 0.4)),
        ("perplexity", 1.5, 0.8, (1.0, 2.3)),
        ("margin", -0.5, 1.0, (-1.5, 0.5)),
    ],
)
def test_what_is_shown_of_an_interval_stays_within_what_the_metric_can_be(
    metric: str, mean: float, half: float, ends: tuple[float, float]
) -> None:
    found = Interval(mean, half)
    assert found.bounds(metric) == pytest.approx(ends)
    assert found.leaves_range(metric) is (ends != pytest.approx((mean - half, mean + half)))
    assert Interval(mean).bounds(metric) is None
    assert not Interval(mean).leaves_range(metric)


def test_a_difference_may_be_as_large_as_the_range() -> None:
    assert Interval(0.9, 0.3).bounds("accuracy", difference=True) == pytest.approx((0.6, 1.0))
    assert Interval(-0.5, 0.3).bounds("accuracy", difference=True) == pytest.approx((-0.8, -0.2))


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (10, 10), (3, 12), (480, 500)])
def test_the_interval_of_a_single_share_is_wilsons(right: int, rows: int) -> None:
    from scipy.stats import binomtest

    wanted = binomtest(right, rows).proportion_ci(method="wilson")
    assert wilson(right / rows, rows) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilsons_interval_covers_the_chance_of_a_row_where_an_even_one_does_not() -> None:
    draw, chance, rows = random.Random(0), 0.97, 40
    shares = [sum(draw.random() < chance for _ in range(rows)) / rows for _ in range(2000)]
    covered = [low <= chance <= high for low, high in (wilson(share, rows) for share in shares)]
    even = [abs(share - chance) <= 1.96 * math.sqrt(share * (1 - share) / rows) for share in shares]
    assert sum(covered) / 2000 > 0.93
    assert sum(even) / 2000 < 0.75
