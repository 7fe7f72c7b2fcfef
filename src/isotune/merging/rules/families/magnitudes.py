"""Which entries of a change are large: quantiles of |x| by a histogram of floating-point bits, in blocks of rows.

The bins are the first 17 bits of |x| in fp32, so that their edges are 0.2 % of a number apart over the whole range
of fp32, and no scale has to be known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isotune.linalg.change import Change
from isotune.merging.contract import Aligned
from isotune.merging.rules.families.entrywise import Step, walk

Trim = Literal["model", "tensor"]
TRIM = "Keep that share of a model's entries over all the weights that it changed, or of each weight."

_BITS = 14
_BINS = 2 ** (31 - _BITS)


class Histogram:
    """How many entries have which magnitude. Memory: 1 MiB."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, change: Change) -> Histogram:
        """Counts the entries of a change."""
        for _, (block,) in walk([change]):
            self.counts += torch.bincount(_bins(block), minlength=_BINS).cpu()
        return self

    def locate(self, k: int) -> tuple[int, int]:
        """The bin with the k-th largest magnitude, and its place in that bin, from 1 for the largest."""
        above = self.counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, k))
        return _BINS - 1 - place, k - (int(above[place - 1]) if place else 0)

    def threshold(self, density: float) -> float:
        """The magnitude at or above which that share of the entries lies, interpolated inside a bin."""
        found, place = self.locate(_kept(int(self.counts.sum()), density))
        low, high = torch.tensor([found, found + 1], dtype=torch.int32).bitwise_left_shift(_BITS).view(torch.float32)
        return float(high - (high - low) * (place / int(self.counts[found])))


def thresholds(sites: Iterable[Aligned], density: float, trim: Trim) -> dict[str, float] | None:
    """For each model the magnitude from which `density` of its entries are kept, over all weights that it changed.

    None where nothing has to be known of the whole model. A model without any change has the threshold 0.
    """
    if trim == "tensor" or density == 1:
        return None
    found: dict[str, Histogram] = {}
    for site in sites:
        for name, change in zip(site.names, site.changes, strict=True):
            counts = Histogram().add(change).counts
            whole = found.setdefault(name, Histogram())
            if counts[1:].any():
                whole.counts += counts
    return {name: whole.threshold(density) if whole.counts.any() else 0.0 for name, whole in found.items()}


def trimming(site: Aligned, density: float, surveyed: dict[str, float] | None) -> list[Step]:
    """For each model, the step that keeps its largest entries: from the surveyed thresholds, else of this weight."""
    if surveyed is not None:
        return [band(surveyed[name]) for name in site.names]
    if density == 1:
        return [band(0.0) for _ in site.names]
    return [band(*largest(change, [_kept(_entries(change), density)])) for change in site.changes]


def without_outliers(change: Change, density: float, gamma: float) -> Step:
    """The step that keeps `density` of the entries, after the largest `gamma` of them or as many as that leaves."""
    entries = _entries(change)
    kept = _kept(entries, density)
    dropped = min(int(gamma * entries), entries - kept)
    high, low = largest(change, [dropped + 1, dropped + kept])
    return band(low, high)


def largest(change: Change, places: Sequence[int]) -> list[float]:
    """The magnitudes at these places, counted from 1 for the largest. Exact; two walks over the change."""
    if not _entries(change):
        return [0.0 for _ in places]
    histogram = Histogram().add(change)
    located = [histogram.locate(k) for k in places]
    inside: dict[int, list[Tensor]] = {found: [] for found, _ in located}
    for _, (block,) in walk([change]):
        bins = _bins(block)
        for found, entries in inside.items():
            entries.append(block.reshape(-1)[bins == found].abs())
    return [float(torch.cat(inside[found]).sort(descending=True).values[place - 1]) for found, place in located]


def band(low: float, high: float | None = None) -> Step:
    """The step that keeps the entries with `low <= |x| <= high`."""

    def keep(x: Tensor) -> Tensor:
        # hardshrink keeps what is larger than its argument, strictly.
        below = torch.nextafter(torch.tensor(low, dtype=x.dtype), torch.tensor(0.0, dtype=x.dtype))
        kept = F.hardshrink(x, float(below)) if low > 0 else x
        return kept if high is None else kept - F.hardshrink(x, high)

    return keep


def _kept(entries: int, density: float) -> int:
    """At least one, so that no tensor is erased for being small."""
    return min(max(1, round(density * entries)), entries)


def _entries(change: Change) -> int:
    return int(torch.Size(change.shape).numel())


def _bins(x: Tensor) -> Tensor:
    return x.abs().float().contiguous().view(torch.int32).flatten() >> _BITS
