"""Means with 95 % t-intervals, and paired differences over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isotune.intervals import half_width


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval; None where one value gives no interval."""

    mean: float
    half_width: float | None

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies in the interval; without an interval nothing excludes it."""
        return self.half_width is None or abs(self.mean) <= self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of at least one value."""
    return Estimate(statistics.fmean(values), half_width(values) if len(values) > 1 else None)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours minus theirs over the seeds that both have; None where there is no such seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
