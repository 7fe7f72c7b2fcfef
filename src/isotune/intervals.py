"""Means over seeds with their 95 % t-intervals, differences paired by seed, and shares of rows.

A t-interval knows nothing of what a metric can be: three seeds of an accuracy of 98 % may give 98 ± 5. What is shown
of it ends at 100 %: no mean lies beyond, so that the part left out takes nothing from its coverage. On a scale of log
odds it would stay within the range, too, but a seed without an error has no place there. A single run's share of its
rows has Wilson's interval, which is within 0 and 1 by itself; it says what other rows would give, and nothing about
other seeds.
"""

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

    def bounds(self, metric: str, difference: bool = False) -> tuple[float, float] | None:
        """The ends of the interval within what the metric, or a difference of two, can be; None without one."""
        if self.half_width is None:
            return None
        low, high = range_of(metric)
        if difference:
            low, high = low - high, high - low
        return max(low, self.mean - self.half_width), min(high, self.mean + self.half_width)

    def leaves_range(self, metric: str, difference: bool = False) -> bool:
        """Whether `bounds` had to cut it, so that it is not the mean plus or minus something."""
        uncut = None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)
        return self.bounds(metric, difference) != uncut

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


def range_of(metric: str) -> tuple[float, float]:
    """The least and the most that a metric can be, by its name."""
    if any(word in metric for word in ("accuracy", "f1", "precision", "recall", "exact_match")):
        return 0.0, 1.0
    if any(word in metric for word in ("similarity", "matthews", "pearson", "spearman")):
        return -1.0, 1.0
    if "perplexity" in metric:
        return 1.0, math.inf
    return (0.0 if metric.endswith(("loss", "rmse")) else -math.inf), math.inf


def wilson(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of the chance of a row to be right, where a share of so many rows (1 or more) is.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2)) / (1 + z**2 / rows)
    return max(0.0, middle - half), min(1.0, middle + half)


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
