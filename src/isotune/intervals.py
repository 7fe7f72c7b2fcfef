"""Means over seeds with their 95 % t-intervals, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Of Student's t at 97.5 %, for 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval; None where a single value gives none."""

    mean: float
    half_width: float | None = None
    values: list[float] = field(default_factory=list)
    """What it is the mean of, where that is known."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """That of at least one value."""
        return cls(statistics.fmean(values), half_width(values) if len(values) > 1 else None, list(values))

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies in the interval; without an interval nothing excludes it."""
        return self.half_width is None or abs(self.mean) <= self.half_width

    def __neg__(self) -> Interval:
        return Interval(-self.mean, self.half_width, [-value for value in self.values])


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], rows: int | None = None) -> Interval | None:
    """Ours minus theirs over the seeds that both have; None where there is no such seed.

    Of shares of so many `rows` that are right, the interval is no narrower than the draw of these rows alone makes
    it: two that differ by d disagree on d of the rows at least, so that the variance of d is `(|d| - d²) / rows` or
    more (McNemar). Seeds that agree to a row say nothing about other rows.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    found = Interval.of([ours[seed] - theirs[seed] for seed in seeds])
    if not rows or found.half_width is None:
        return found
    least = statistics.NormalDist().inv_cdf(0.975) * math.sqrt(max(abs(found.mean) - found.mean**2, 0.0) / rows)
    return Interval(found.mean, max(found.half_width, least), found.values)


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean of two values or more."""
    return quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def quantile(freedom: int) -> float:
    """Student's t at 97.5 %; above 9 degrees of freedom by its expansion about the normal (error below 1e-3)."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
