"""Subspace overlap: how far two adaptations read the same inputs and write the same outputs of a layer.

The column space of a change is what it writes, the row space what it reads; of each, the k leading singular
directions are compared, by the cosines of their principal angles. `overlap = Σ cos² / min(k1, k2)`: 1 where one
space holds the other, and about `max(k1, k2) / d` by chance for spaces drawn at random in d dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from isotune.linalg.change import Change, change_svd
from isotune.linalg.leading import leading_svd
from isotune.linalg.low_rank import SVD, Factored, principal_cosines


@dataclass(frozen=True)
class SiteOverlap:
    """Two changes of one weight."""

    site: str
    columns: float
    """Overlap of the column spaces, 0 to 1."""
    rows: float
    """Overlap of the row spaces."""
    column_chance: float
    """What two spaces of these dimensions have by chance."""
    row_chance: float
    column_cosines: list[float]
    """Cosines of the principal angles, descending."""
    row_cosines: list[float]


@dataclass(frozen=True)
class Overlap:
    """Two adaptations, on the matrices that both change."""

    models: tuple[str, str]
    columns: float | None
    """Mean over the matrices; None where there is none."""
    rows: float | None
    column_chance: float | None
    row_chance: float | None
    sites: list[SiteOverlap]

    @classmethod
    def of(cls, models: tuple[str, str], sites: list[SiteOverlap]) -> Overlap:
        """The means over the matrices."""

        def mean(values: list[float]) -> float | None:
            return sum(values) / len(values) if values else None

        return cls(
            models,
            mean([site.columns for site in sites]),
            mean([site.rows for site in sites]),
            mean([site.column_chance for site in sites]),
            mean([site.row_chance for site in sites]),
            sites,
        )


def directions(change: Change, k: int) -> SVD:
    """The at most k leading singular triplets of a change; none of a change of nothing."""
    if isinstance(change, Factored):
        return change_svd(change).first(k)
    return leading_svd(change, None, k).supported()


def subspace_overlap(one: SVD, other: SVD, site: str = "") -> SiteOverlap | None:
    """The overlap of two changes by their `directions`; None where one changes nothing, or the shapes differ."""
    if len(one.S) == 0 or len(other.S) == 0 or len(one.U) != len(other.U) or len(one.V) != len(other.V):
        return None
    columns, rows = principal_cosines(one.U, other.U), principal_cosines(one.V, other.V)
    largest = max(len(one.S), len(other.S))
    return SiteOverlap(
        site,
        _mean_square(columns),
        _mean_square(rows),
        largest / len(one.U),
        largest / len(one.V),
        columns.tolist(),
        rows.tolist(),
    )


def _mean_square(cosines: Tensor) -> float:
    return float(cosines.double().square().mean())
