"""What a comparison says about forgetting: the base's own score, and what each row kept of it."""

from __future__ import annotations

from dataclasses import dataclass

from isotune.report import words
from isotune.report.data import Comparison, Json
from isotune.report.intervals import Estimate
from isotune.report.standings import FROZEN


@dataclass(frozen=True)
class Measure:
    """One measure of forgetting."""

    key: str
    label: str
    base: float | None
    higher_is_better: bool


def measures(comparison: Comparison) -> list[Measure]:
    """The measures that the summary declares and some row has."""
    declared = comparison.summary.get("forgetting") or {}
    return [
        Measure(key, own.get("label") or key.replace("_", " "), own.get("base"), own.get("higher_is_better", True))
        for key, own in declared.items()
        if any(kept(row, key) for row in comparison.rows)
    ]


def kept(row: Json, key: str) -> Estimate | None:
    """The row's value on a measure of forgetting, or None."""
    own = (row.get("forgetting") or {}).get(key)
    return None if not own or own.get("mean") is None else Estimate(own["mean"], own.get("half_width"))


def forgetting_findings(comparison: Comparison) -> list[str]:
    """For each measure a sentence: who keeps most of the base, and who least."""
    said = []
    for measure in measures(comparison):
        found = [(row, kept(row, measure.key)) for row in comparison.rows if row["method"] != FROZEN]
        known = [(row, value) for row, value in found if value is not None]
        if len(known) < 2:
            continue
        sign = 1 if measure.higher_is_better else -1
        (most, high), (least, low) = (f(known, key=lambda pair: sign * pair[1].mean) for f in (max, min))
        base = "" if measure.base is None else f" (the base itself: {words.score(measure.key, measure.base)})"
        apart = abs(high.mean - low.mean) > (high.half_width or 0) + (low.half_width or 0)
        known_apart = apart and high.half_width is not None and low.half_width is not None
        said.append(
            f"Forgetting, {measure.label}: {_name(most)} keeps most, {_value(measure, high)}, and {_name(least)} "
            f"least, {_value(measure, low)}{base}"
            + ("." if known_apart else "; their intervals overlap." if high.half_width is not None else ".")
        )
    return said


def _value(measure: Measure, value: Estimate) -> str:
    return words.score(measure.key, value.mean, value.half_width)


def _name(row: Json) -> str:
    budget = f" at {row['budget']:,}" if row.get("budget") else ""
    return f"{words.method_name(row['method'])}{budget}"
