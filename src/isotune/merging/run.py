"""Apply a rule to all sites, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from isotune.merging.contract import Aligned, Change, Rule, size


class Run:
    """The merged changes, computed as they are iterated over; `factor`, known after the last, belongs on all."""

    def __init__(self, rule: Rule, sites: Callable[[], Iterable[Aligned]]) -> None:
        """`sites` gives a fresh walk over the same sites each time: one for the survey, one for the merging."""
        self.rule, self.sites = rule, sites
        self.factor = math.nan

    def __iter__(self) -> Iterator[tuple[Aligned, Change]]:
        surveyed = self.rule.survey(self.sites())
        rescales = type(self.rule).rescale is not Rule.rescale
        norms: dict[str, float] = {}
        merged = 0.0
        for site in self.sites():
            change = self.rule.merge(site, surveyed)
            if rescales:
                merged = math.hypot(merged, size(change))
                for name, own in zip(site.names, site.changes, strict=True):
                    norms[name] = math.hypot(norms.get(name, 0.0), size(own))
            yield site, change
        self.factor = self.rule.rescale(list(norms.values()), merged) if rescales else 1.0
