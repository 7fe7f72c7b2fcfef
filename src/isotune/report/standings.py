"""Who is best at each budget of a comparison, and who cannot be told apart from the best."""

from __future__ import annotations

from dataclasses import dataclass, field

from isotune.report.data import Comparison, Json
from isotune.report.intervals import Estimate, estimate, paired

FULL, FROZEN = "full", "frozen"


@dataclass(frozen=True)
class Standing:
    """A row of a comparison with its score, and how far the best of its group lies ahead of it."""

    row: Json
    score: Estimate
    behind: Estimate | None = None
    """The best minus this one, paired over seeds, positive where the best is better; None for the best itself."""

    @property
    def method(self) -> str:
        """The method's name."""
        return self.row["method"]

    @property
    def tied(self) -> bool:
        """Whether the paired interval holds zero."""
        return self.behind is None or self.behind.holds_zero


@dataclass(frozen=True)
class Group:
    """The methods at one budget, the best first."""

    budget: int | None
    standings: list[Standing] = field(default_factory=list)

    @property
    def best(self) -> Standing:
        """The highest mean."""
        return self.standings[0]

    @property
    def tied(self) -> list[Standing]:
        """The others that cannot be told apart from the best."""
        return [standing for standing in self.standings[1:] if standing.tied]


def groups(comparison: Comparison) -> list[Group]:
    """One for each budget, the smallest first; full fine-tuning and the frozen base are in none."""
    rows = [row for row in comparison.rows if row["values"] and row["method"] not in (FULL, FROZEN)]
    budgets = sorted({row.get("budget") for row in rows}, key=lambda budget: (budget is None, budget))
    return [Group(b, ranked(comparison, [row for row in rows if row.get("budget") == b])) for b in budgets]


def ranked(comparison: Comparison, rows: list[Json]) -> list[Standing]:
    """The rows, the best first, each with its distance to the best."""
    higher = comparison.summary.get("higher_is_better", True)
    order = sorted(rows, key=lambda row: mean(row), reverse=higher)
    return [Standing(row, score(row), None if row is order[0] else lead(comparison, order[0], row)) for row in order]


def lead(comparison: Comparison, one: Json, other: Json) -> Estimate | None:
    """How much better one row is than another, paired over seeds; positive is better, None without a common seed."""
    ours, theirs = comparison.seeds(one), comparison.seeds(other)
    if other["method"] == FROZEN and len(theirs) == 1:  # the same for every seed: nothing in it is drawn
        theirs = dict.fromkeys(ours, *theirs.values())
    found = paired(ours, theirs)
    if found is None or comparison.summary.get("higher_is_better", True):
        return found
    return Estimate(-found.mean, found.half_width)


def reference(comparison: Comparison, method: str) -> Json | None:
    """The row of full fine-tuning or of the frozen base, where it has results."""
    return next((row for row in comparison.rows if row["method"] == method and row["values"]), None)


def mean(row: Json) -> float:
    """The row's mean score."""
    return float(row["mean"]) if row.get("mean") is not None else estimate(row["values"]).mean


def score(row: Json) -> Estimate:
    """The row's mean score with its interval, as the comparison computed it, else a t-interval."""
    own = estimate(row["values"])
    return Estimate(mean(row), row.get("half_width", own.half_width))
