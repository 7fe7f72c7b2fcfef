"""What a comparison's summary says and what it does not: order, ties, and what tuning was worth."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from isotune.intervals import half_width

Row = dict[str, Any]
Summary = dict[str, Any]
REFERENCES = {"full": "full fine-tuning", "frozen": "the frozen base"}
"""What a comparison puts beside the methods."""


def summaries(docs: Path) -> dict[str, Summary]:
    """The committed comparisons by the name of their folder under docs/examples; other folders there are left out."""
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(docs.glob("examples/*/summary.json"))}
    return {name: summary for name, summary in found.items() if {"metric", "rows"} <= summary.keys()}


def one_pass(result: dict[str, Any], baseline: str) -> Summary:
    """The comparison of all methods by `benchmarks.accuracy` in the form of a summary."""
    rows: list[Row] = [
        {
            "method": name,
            "budget": result["budget"],
            "options": {key: value for key, value in row["method"].items() if key != "name"},
            "parameters": row["parameters"],
            "values": row["accuracy"],
            "learning_rates": row["searched"],
            "edge": row["rate"] in (min(result["rates"]), max(result["rates"])),
        }
        for name, row in result["methods"].items()
    ]
    frozen = {"method": "frozen", "budget": None, "values": [result["probe_accuracy"]]}
    return {
        "metric": "accuracy",
        "higher_is_better": True,
        "baseline": baseline,
        "seeds": len(result["seeds"]),
        "trials": len(result["rates"]),
        "rows": [*rows, frozen],
    }


def budgets(summary: Summary) -> list[int]:
    """The budgets that methods were compared at, ascending."""
    return sorted({row["budget"] for row in summary["rows"] if row["budget"] is not None and row["values"]})


def ranked(summary: Summary, budget: int | None) -> list[Row]:
    """The rows at a budget that have a result, best mean first."""
    rows = [row for row in summary["rows"] if row["budget"] == budget and row["values"]]
    return sorted(rows, key=lambda row: statistics.fmean(row["values"]), reverse=summary["higher_is_better"])


def difference(row: Row, other: Row) -> tuple[float, float | None]:
    """`row` minus `other`, paired over the seeds: mean and half of its 95 % t-interval.

    Only seeds that both have count; the half is None for fewer than two of them.
    """
    ours, theirs = _by_seed(row), _by_seed(other)
    paired = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not paired:
        return statistics.fmean(row["values"]) - statistics.fmean(other["values"]), None
    return statistics.fmean(paired), half_width(paired) if len(paired) > 1 else None


def _by_seed(row: Row) -> dict[int, float]:
    return dict(zip(row.get("seeds", range(len(row["values"]))), row["values"], strict=True))


def apart(row: Row, other: Row) -> bool:
    """Whether the interval of their difference leaves zero out."""
    mean, half = difference(row, other)
    return half is not None and abs(mean) > half


def tied_with_best(rows: list[Row]) -> list[Row]:
    """The best of ranked rows, and all that cannot be told apart from it."""
    return [row for row in rows if row is rows[0] or not apart(row, rows[0])]


def worth_of_tuning(rows: list[Row]) -> tuple[float, float]:
    """The median over the methods of best minus worst validation score by learning rate, and best minus worst method.

    The second is that of validation scores at each method's best rate, so that the two can be compared. A higher
    score is better. Rates that diverged, whose score is None, are left out: the first is too small if anything.
    """
    tried = [[score for score in row.get("learning_rates", {}).values() if score is not None] for row in rows]
    scores = [found for found in tried if len(found) > 1]
    best = [max(found) for found in scores]
    return statistics.median(max(found) - min(found) for found in scores), max(best) - min(best)
