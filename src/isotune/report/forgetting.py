"""What a comparison says about forgetting: the base's own score, and what each row kept of it."""

from __future__ import annotations

from collections import defaultdict

from isotune.comparison.results import FROZEN, Measure, Row
from isotune.intervals import Interval
from isotune.report import words
from isotune.report.data import Comparison
from isotune.report.words import row_name


def measures(comparison: Comparison) -> dict[str, Measure]:
    """The measures of forgetting that the summary declares and some row has, by name."""
    summary = comparison.summary
    return {
        key: measure
        for key, measure in summary.forgetting.items()
        if any(key in row.forgetting for row in summary.rows)
    }


def forgetting_findings(comparison: Comparison) -> list[str]:
    """For each measure a sentence: who keeps most of the base, and who least; and one of them at equal scores."""
    said = []
    rows = [row for row in comparison.summary.rows if row.method != FROZEN]
    for key, measure in measures(comparison).items():
        base = "" if measure.base is None else f" (the base itself: {words.score(key, measure.base)})"
        known = [(row, row.forgetting[key]) for row in rows if key in row.forgetting]
        if len(known) > 1:
            said.append(f"Forgetting, {measure.label}: {_most_and_least(key, measure, known, base)}")
        at: dict[float, list[tuple[Row, Interval]]] = defaultdict(list)
        for row in rows:
            if row.forgetting_at is not None and key in row.forgetting_at.forgetting:
                at[row.forgetting_at.score].append((row, row.forgetting_at.forgetting[key]))
        metric = comparison.summary.metric
        said += [
            f"At an equal validation {metric} of {words.score(metric, score)}, {measure.label}: "
            f"{_most_and_least(key, measure, equal, base)}"
            for score, equal in at.items()
            if len(equal) > 1
        ]
    return said


def _most_and_least(key: str, measure: Measure, known: list[tuple[Row, Interval]], base: str) -> str:
    sign = 1 if measure.higher_is_better else -1
    (most, high), (least, low) = (f(known, key=lambda pair: sign * pair[1].mean) for f in (max, min))
    apart = abs(high.mean - low.mean) > (high.half_width or 0) + (low.half_width or 0)
    known_apart = apart and high.half_width is not None and low.half_width is not None
    return (
        f"{row_name(most)} keeps most, {_value(key, high)}, and {row_name(least)} least, {_value(key, low)}{base}"
        + ("." if known_apart else "; their intervals overlap." if high.half_width is not None else ".")
    )


def _value(key: str, value: Interval) -> str:
    return words.score(key, value.mean, value.half_width)
