"""Repetitions that alternate between contenders, so that a drift of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Step = Callable[[], dict[str, float]]
"""Does the work once and returns the seconds of each phase; "total" is one of them."""


@dataclass(frozen=True)
class Effort:
    """How often a contender is repeated: until `seconds` are spent, at least `least` and at most `most` times."""

    seconds: float
    least: int
    most: int
    limit: float = 15.0
    """Past this many seconds two repetitions are enough."""
    sample: float = 0.004
    """A sample is the mean of as many calls as fill this many seconds, so that the clock's grain does not show."""


@dataclass
class Samples:
    """What is known of one contender."""

    calls: int
    """Calls in each sample."""
    phases: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of one call, one entry a repetition."""
    spent: float = 0.0

    def take(self, step: Step) -> None:
        """Add one repetition."""
        sums: dict[str, float] = {}
        start = time.perf_counter()
        for _ in range(self.calls):
            for phase, seconds in step().items():
                sums[phase] = sums.get(phase, 0.0) + seconds
        self.spent += time.perf_counter() - start
        for phase, seconds in sums.items():
            self.phases.setdefault(phase, []).append(seconds / self.calls)

    def enough(self, effort: Effort) -> bool:
        """Whether this contender has had its share."""
        count = len(self.phases.get("total", ()))
        least = effort.least if self.spent < effort.limit else min(effort.least, 2)
        return count >= effort.most or (count >= least and self.spent >= effort.seconds)


def alternate(steps: Mapping[str, Step], effort: Effort) -> dict[str, Samples]:
    """Repeat every step, taking turns; each round runs in the opposite order of the one before."""
    samples = {name: Samples(_calls(step, effort)) for name, step in steps.items()}
    order = list(steps)
    while running := [name for name in order if not samples[name].enough(effort)]:
        for name in running:
            samples[name].take(steps[name])
        order.reverse()
    return samples


def _calls(step: Step, effort: Effort) -> int:
    # The first call fills caches; its time counts only where it is long enough for that not to matter.
    once = step()["total"]
    if once < 1:
        once = step()["total"]
    return max(1, min(200, round(effort.sample / max(once, 1e-9))))


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, quartiles and number of the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "q1": low, "median": middle, "q3": high, "repetitions": len(values)}


def clock(device: str) -> Callable[[], float]:
    """A clock that waits for the device first."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def waiting() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return waiting
