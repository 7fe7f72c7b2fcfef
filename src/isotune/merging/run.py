"""Apply a rule to all sites, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from isotune.linalg.change import Change, size
from isotune.merging.contract import Aligned, Rule


@dataclass
class Norms:
    """Frobenius norms over the sites merged so far."""

    models: dict[str, float] = field(default_factory=dict)
    """Of each model's changes, by its name."""
    merged: float = 0.0
    """Of the merged changes."""


class Run:
    """The merged changes, computed as they are iterated over; `factor`, known after the last, belongs on all."""

    def __init__(self, rule: Rule, sites: Callable[[], Iterable[Aligned]], norms: Norms | None = None) -> None:
        """`sites` gives a fresh walk over the same sites each time: one for the survey, one for the merging.

        With `norms`, a run goes on for which some sites were merged before.
        """
        self.rule, self.sites = rule, sites
        self.norms = norms or Norms()
        self.rescales = type(rule).rescale is not Rule.rescale
        self._surveyed: Any = None

    def __iter__(self) -> Iterator[tuple[Aligned, Change]]:
        self.survey()
        for site in self.sites():
            yield site, self.merge(site)

    def survey(self) -> None:
        """The rule's walk over all sites, which comes before the first `merge`."""
        self._surveyed = self.rule.survey(self.sites())

    def merge(self, site: Aligned) -> Change:
        """The merged change of one site, which counts for `factor`."""
        change = self.rule.merge(site, self._surveyed)
        if self.rescales:
            self.norms.merged = math.hypot(self.norms.merged, size(change))
            for name, own in zip(site.names, site.changes, strict=True):
                self.norms.models[name] = math.hypot(self.norms.models.get(name, 0.0), size(own))
        return change

    @property
    def factor(self) -> float:
        """The factor on all merged changes, once every site is merged."""
        return self.rule.rescale(list(self.norms.models.values()), self.norms.merged) if self.rescales else 1.0
