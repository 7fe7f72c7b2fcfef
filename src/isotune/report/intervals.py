"""Means with 95 % t-intervals, and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval; None where one value gives no interval."""

    mean: float
    half_width: float | None

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies in the interval; without an interval nothing excludes it."""
        return self.half_width is None or abs(self.mean) <= self.half_width


def quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t with `freedom` >= 1 degrees of freedom, to about 1e-4."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z, n = 1.959964, float(freedom)  # the Cornish-Fisher expansion
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third / n**3


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, quantile(len(values) - 1) * math.sqrt(variance / len(values)))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours minus theirs over the seeds that both have; None where there is no such seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
