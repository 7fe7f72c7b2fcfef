"""Forgetting at equal scores: one run can look forgetful only because it learned more.

Each seed's run is measured along the way. Rows at one budget are compared where their validation score was the worst
of the rows' means at the end, which all of them reach; between two measurements both are taken to be straight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from isotune.comparison.results import FROZEN, EqualScore, Line, Row
from isotune.intervals import Interval

_PREFIX = "forgetting_"


class Point(NamedTuple):
    """A measurement along a run."""

    step: float
    score: float
    """On the validation rows."""
    forgetting: dict[str, float]


def equal_scores(
    rows: Sequence[Row], lines: Iterable[Line], metric: str, higher: bool
) -> Iterator[tuple[Row, EqualScore]]:
    """For each row whose seeds were measured along the way, what it had forgotten at the score of its budget."""
    by_place: dict[Any, dict[int | None, list[Point]]] = defaultdict(dict)
    for line in lines:
        if line.kind == "seed" and line.done and line.method != FROZEN and (points := along(line, metric)):
            by_place[line.method, line.budget][line.seed] = points
    at_budget: dict[int | None, list[tuple[Row, list[list[Point]]]]] = defaultdict(list)
    for row in rows:
        curves = [own[seed] for seed in row.seeds if seed in (own := by_place.get((row.method, row.budget), {}))]
        if curves:
            at_budget[row.budget].append((row, curves))
    for found in at_budget.values():
        ends = [Interval.of([curve[-1].score for curve in curves]).mean for _, curves in found]
        score = min(ends) if higher else max(ends)
        for row, curves in found:
            yield row, _at(curves, score, higher)


def along(line: Line, metric: str) -> list[Point]:
    """What was measured along a seed's run, in order, its end included; nothing where it was measured only there."""
    points = [
        Point(entry["step"], entry[f"eval_{metric}"], _forgotten(entry, f"eval_{_PREFIX}"))
        for entry in line.curve
        if f"eval_{metric}" in entry and any(name.startswith(f"eval_{_PREFIX}") for name in entry)
    ]
    steps, score = line.metrics.get("steps"), line.metrics.get(f"validation_{metric}")
    if points and steps is not None and score is not None and points[-1].step < steps:
        points.append(Point(steps, score, _forgotten(line.metrics, _PREFIX)))
    return points


def _forgotten(entry: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}


def _at(curves: Sequence[Sequence[Point]], score: float, higher: bool) -> EqualScore:
    reached = [_reached(curve, score, higher) for curve in curves]
    points = [point for point, _ in reached]
    return EqualScore(
        score=score,
        steps=Interval.of([point.step for point in points]),
        forgetting={name: Interval.of([point.forgetting[name] for point in points]) for name in points[0].forgetting},
        beyond=sum(not within for _, within in reached),
    )


def _reached(curve: Sequence[Point], score: float, higher: bool) -> tuple[Point, bool]:
    """Where a curve first comes to a score, and whether that lies on it; else its first or its best point."""
    sign = 1 if higher else -1
    ahead = [sign * (point.score - score) for point in curve]
    index = next((index for index, lead in enumerate(ahead) if lead >= 0), None)
    if index is None:
        return curve[max(range(len(curve)), key=ahead.__getitem__)], False
    if index == 0:
        return curve[0], ahead[0] == 0
    (before, after), share = curve[index - 1 : index + 1], ahead[index - 1] / (ahead[index - 1] - ahead[index])
    forgetting = {
        name: before.forgetting[name] + share * (value - before.forgetting[name])
        for name, value in after.forgetting.items()
    }
    return Point(before.step + share * (after.step - before.step), score, forgetting), True
