"""The comparisons that are committed, and what tuning was worth in them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from isotune.comparison.results import FROZEN, FULL, Row, Summary

REFERENCES = {FULL: "full fine-tuning", FROZEN: "the frozen base"}
"""What a comparison puts beside the methods."""


def summaries(docs: Path) -> dict[str, Summary]:
    """The committed comparisons by the name of their folder under docs/examples; other folders there are left out."""
    files = sorted(docs.glob("examples/*/summary.json"))
    return {file.parent.name: Summary.read(file) for file in files if "rows" in json.loads(file.read_text())}


def worth_of_tuning(rows: Sequence[Row]) -> tuple[float, float]:
    """The median over the methods of best minus worst validation score by learning rate, and best minus worst method.

    The second is that of validation scores at each method's best rate, so that the two can be compared. A higher
    score is better. Rates that diverged, whose score is None, are left out: the first is too small if anything.
    """
    tried = [[score for score in row.learning_rates.values() if score is not None] for row in rows]
    scores = [own for own in tried if len(own) > 1]
    best = [max(own) for own in scores]
    return statistics.median(max(own) - min(own) for own in scores), max(best) - min(best)
