"""`python -m benchmarks.rates`: what methods reach at their default learning rates, and with `auto`, of the most.

From the comparisons under docs/examples/rates, and the runs of examples/compare-rates/auto.py beside them, on
validation rows; the part of docs/learning-rates.md between its marks is written anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import table
from isotune.adapters.registry import method_class
from isotune.comparison.results import FROZEN, FULL

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "learning-rates.md"
BEGIN, END = "<!-- rates: written by python -m benchmarks.rates -->", "<!-- end of rates -->"
BEDS = {
    "scicite": ("MiniLM, SciCite, 60 steps", "validation_accuracy", 100),
    "banking77": ("MiniLM, BANKING77, 60 steps", "validation_accuracy", 100),
    "shakespeare": ("stories260K, Shakespeare, 140 steps", "validation_loss", -1),
    "gsm8k": ("SmolLM2, GSM8K, 36 steps", "validation_loss", -1),
    "efficientnet": ("EfficientNet-lite0, photographs, 64 steps", "validation_accuracy", 100),
}
"""By folder: what is trained on, the score, and its factor, negative where less is better."""
FORGETS = "gsm8k"
"""Where it was also measured what is forgotten."""
CONVOLUTIONS = "ResNet-20, inverted colours, 46 steps"
"""A bed of its own: examples/compare-convolutions, whose lines are docs/convolutions-compared.jsonl."""
DEPTH = math.sqrt(19 / 12)
"""Its runs were made before the rates of what is no rotation were divided by this."""
ROTATIONS = ("hra", "oft")
LITTLE = 3.0
"""Points of accuracy: of a smaller gain at the best rate no share is told."""


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

    def reached(self, score: float) -> str:
        """The gain of a score as a share of that at the best rate tried; where that is next to nothing, in points."""
        most, gain = self.scores[self.best] - self.frozen, score - self.frozen
        accuracy = self.frozen > 0  # losses are negative here
        return f"{gain:+.1f} points" if accuracy and most < LITTLE else f"{100 * gain / most:.0f} %"

    @property
    def cell(self) -> str:
        """What the default reaches, and the best rate."""
        score = self.scores.get(self.default)
        edge = ", at the end" if self.best in (min(self.scores), max(self.scores)) else ""
        return "" if score is None else f"{self.reached(score)} ({self.best:g}{edge})"


def main() -> None:
    """Write the part of the page."""
    path = DOCS / PAGE
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{section(DOCS)}{rest.partition(END)[2]}")


def section(docs: Path) -> str:
    """The part of the page, its marks included."""
    made = {name: docs / "examples" / "rates" / name / "results.jsonl" for name in BEDS}
    found = {BEDS[name][0]: list(_found(path, name)) for name, path in made.items() if path.exists()}
    found[CONVOLUTIONS] = list(_on_convolutions(docs / "convolutions-compared.jsonl"))
    methods = [one.method for one in next(iter(found.values()))]
    return "\n\n".join((BEGIN, _reached(methods, found), _by_auto(methods, found), _kept(made[FORGETS]), END))


def _reached(methods: list[str], found: dict[str, list[Found]]) -> str:
    body = []
    for method in methods:
        own = (next((one.cell for one in rows if one.method == method), "") for rows in found.values())
        body.append([method, f"{method_class(method).learning_rate:g}", *own])
    return table(["method", "default", *found], body)


def _by_auto(methods: list[str], found: dict[str, list[Found]]) -> str:
    beds = {bed: {one.method: one for one in rows if one.auto} for bed, rows in found.items()}
    beds = {bed: rows for bed, rows in beds.items() if rows}
    header = [cell for bed in beds for cell in (f"{bed}: `auto` finds", "and reaches")]
    body = []
    for method in methods:
        cells: list[str] = []
        for rows in beds.values():
            one = rows.get(method)
            cells += [f"{one.auto[0]:g}", one.reached(one.auto[1])] if one and one.auto else ["", ""]
        body.append([method, *cells])
    return table(["method", *header], body)


def _kept(path: Path) -> str:
    """What was measured on test rows and other text: of each method at its default, and at the best rate tried."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    body = []
    for line in lines:
        found, name, rate = line["metrics"], line["method"], line["learning_rate"]
        if line["kind"] == "seed" and "forgetting_perplexity" in found:
            own = None if name in (FROZEN, FULL) else method_class(name.split()[0]).learning_rate
            said = "" if rate is None else f"{rate:g}{', its default' if rate == own else ''}"
            body.append([name, said, f"{found['test_loss']:.3f}", f"{found['forgetting_perplexity']:.1f}"])
    order = sorted(body, key=lambda row: (row[0] != FROZEN, row[0]))
    return table(["method", "rate", "loss on test answers", "perplexity on other text"], order)


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
    by_auto = {line["method"]: (line["learning_rate"], line[metric] * factor) for line in auto}
    for method, own in scores.items():
        if " " in method:  # a method with options, of another table
            continue
        yield Found(method, own, frozen, by_auto.get(method))


def _on_convolutions(path: Path) -> Iterator[Found]:
    """Of the runs that searched, those of seed 0, at the rates that would be given for their steps today."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    frozen = next(100 * line["validation"] for line in lines if line["name"] == "frozen base")
    for name in dict.fromkeys(line["name"] for line in lines):
        depth = 1.0 if name in ROTATIONS else DEPTH
        scores = {
            float(f"{one['rate'] * depth:.2g}"): 100 * one["validation"]
            for one in lines
            if (one["name"], one["seed"]) == (name, 0)
        }
        if scores:
            yield Found(name, scores, frozen)


if __name__ == "__main__":
    main()
