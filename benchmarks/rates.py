"""`python -m benchmarks.rates`: what methods reach at their default learning rates, and with `auto`, of the most.

From the comparisons under docs/examples/rates, and the runs of examples/compare-rates/auto.py beside them, on
validation rows; the part of docs/learning-rates.md between its marks is written anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import table
from isotune.adapters.registry import method_class
from isotune.comparison.results import FROZEN

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "learning-rates.md"
BEGIN, END = "<!-- rates: written by python -m benchmarks.rates -->", "<!-- end of rates -->"
BEDS = {
    "scicite": ("MiniLM, SciCite, 60 steps", "validation_accuracy", 100),
    "shakespeare": ("stories260K, Shakespeare, 140 steps", "validation_loss", -1),
}
"""By folder: what is trained on, the score, and its factor, negative where less is better."""
CONVOLUTIONS = "ResNet-20, inverted colours, 46 steps"
"""A bed of its own: examples/compare-convolutions, whose lines are docs/convolutions-compared.jsonl."""


@dataclass(frozen=True)
class Found:
    """One method in one comparison: scores by learning rate, more is better, and that of the frozen model."""

    method: str
    scores: dict[float, float]
    frozen: float
    auto: tuple[float, float] | None = None
    """The rate that `learning_rate: auto` found, and its score."""

    @property
    def default(self) -> float:
        """The method's own rate."""
        return method_class(self.method).learning_rate

    @property
    def best(self) -> float:
        """The rate with the best score."""
        return max(self.scores, key=lambda rate: self.scores[rate])

    def reached(self, score: float) -> float:
        """The gain of a score as a share of that at the best rate tried."""
        return (score - self.frozen) / (self.scores[self.best] - self.frozen)


def main() -> None:
    """Write the part of the page."""
    path = DOCS / PAGE
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{section(DOCS)}{rest.partition(END)[2]}")


def section(docs: Path) -> str:
    """The part of the page, its marks included."""
    found = {name: list(_found(docs / "examples" / "rates" / name / "results.jsonl", name)) for name in BEDS}
    methods = [one.method for one in found["scicite"]]
    header = ["method", "default"]
    for title, _, _ in BEDS.values():
        header += [f"{title}: best rate", "default reaches", "auto finds", "and reaches"]
    header += [f"{CONVOLUTIONS}: best rate", "default reaches"]
    convolved = list(_on_convolutions(docs / "convolutions-compared.jsonl"))
    body = []
    for method in methods:
        own = [next((one for one in rows if one.method == method), None) for rows in found.values()]
        cells = [cell for one in own for cell in (_cells(one) if one else [""] * 4)]
        last = next((_cells(one)[:2] for one in convolved if one.method == method), [""] * 2)
        body.append([method, f"{method_class(method).learning_rate:g}", *cells, *last])
    return "\n\n".join((BEGIN, table(header, body), END))


def _cells(one: Found) -> list[str]:
    edge = " (edge)" if one.best in (min(one.scores), max(one.scores)) else ""
    cells = [f"{one.best / one.default:.2g} x{edge}", f"{100 * one.reached(one.scores[one.default]):.0f} %"]
    if one.auto is None:
        return [*cells, "", ""]
    rate, score = one.auto
    return [*cells, f"{rate / one.default:.2g} x", f"{100 * one.reached(score):.0f} %"]


def _found(path: Path, bed: str) -> Iterator[Found]:
    _, metric, factor = BEDS[bed]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    frozen = next(line["metrics"][metric] for line in lines if line["method"] == FROZEN) * factor
    scores: dict[str, dict[float, float]] = {}
    for line in lines:
        if line["kind"] == "trial" and line["status"] == "done":
            scores.setdefault(line["method"], {})[line["learning_rate"]] = line["metrics"][metric] * factor
    beside = path.with_name("auto.jsonl")
    auto = [json.loads(line) for line in beside.read_text().splitlines()] if beside.exists() else []
    found = {line["method"]: (line["learning_rate"], line[metric] * factor) for line in auto}
    return (Found(method, own, frozen, found.get(method)) for method, own in scores.items())


def _on_convolutions(path: Path) -> Iterator[Found]:
    """Of the runs that searched, those of seed 0."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    frozen = next(line["validation"] for line in lines if line["name"] == "frozen base")
    for name in dict.fromkeys(line["name"] for line in lines):
        if scores := {one["rate"]: one["validation"] for one in lines if (one["name"], one["seed"]) == (name, 0)}:
            yield Found(name, scores, frozen)


if __name__ == "__main__":
    main()
