"""Means over seeds, with their 95 % t-intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Of Student's t at 97.5 %, for 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """The mean of some values, and half the width of its interval (None for a single value)."""

    values: list[float]
    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least one value."""
        return cls(list(values), statistics.fmean(values), half_width(values) if len(values) > 1 else None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


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
