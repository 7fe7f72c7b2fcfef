"""The runs that a comparison still needs, as they follow from the results so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isotune.comparison.plan import Cell
from isotune.comparison.rates import tried
from isotune.comparison.recipe import ComparisonRecipe
from isotune.comparison.results import Kind, Line
from isotune.training.tasks.contract import signed
from isotune.training.tasks.names import metric_of


@dataclass(frozen=True)
class Unit:
    """One run: a trial of a learning rate, a seed at the best one, or a few steps timed alone."""

    cell: Cell
    kind: Kind
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Its name in the results, and its folder's."""
        if self.kind == "cost":
            return f"{self.cell.key}-cost"
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.cell.key}{rate}-seed{self.seed}"

    def line(self, **fields: Any) -> Line:
        """Its line in the results."""
        return Line(
            unit=self.name,
            kind=self.kind,
            method=self.cell.label,
            budget=self.cell.budget,
            options=self.cell.options,
            parameters=self.cell.parameters,
            learning_rate=self.rate,
            seed=self.seed,
            **fields,
        )


@dataclass(frozen=True)
class Search:
    """A cell's search for a learning rate, as far as it has come."""

    rates: list[float]
    """The rates that belong to it, in order."""
    scores: dict[float, float | None]
    """Of those that have been tried, the score on the validation rows (higher is better), None where it diverged."""
    missing: list[float]
    """Of those, the rates that can be tried now."""
    best: float | None
    """The rate of the highest score, once all are tried; None before, and where all diverged."""

    @property
    def finished(self) -> bool:
        """Whether all its rates have been tried."""
        return not self.missing


def search_of(cell: Cell, recipe: ComparisonRecipe, lines: Mapping[str, Line]) -> Search:
    """The state of a cell's search in the results `lines`."""
    metric = metric_of(recipe.task, recipe.metric)

    def score(line: Line) -> float | None:
        """What a trial is chosen by; None where it diverged."""
        value = line.metrics.get(f"validation_{metric}")
        return None if value is None else signed(metric, value)

    own = {
        line.learning_rate: score(line)
        for line in lines.values()
        if line.kind == "trial"
        and line.learning_rate is not None
        and line.unit == Unit(cell, "trial", line.learning_rate, recipe.seed).name
    }
    rates, missing = tried(cell, recipe.compare.span, recipe.compare.trials, own)
    scores = {rate: own[rate] for rate in rates if rate in own}
    known = {rate: value for rate, value in scores.items() if value is not None}
    best = max(known, key=known.__getitem__) if known and not missing else None
    return Search(rates, scores, missing, best)


def seeds(recipe: ComparisonRecipe) -> list[int]:
    """The seeds that are compared: none of them took part in the search."""
    return list(range(recipe.seed + 1, recipe.seed + 1 + recipe.compare.seeds))


def chosen(cell: Cell, recipe: ComparisonRecipe, lines: Mapping[str, Line]) -> list[Unit]:
    """The units of a cell's row, one a seed; none before its search is finished, or where every rate diverged."""
    rate = search_of(cell, recipe, lines).best if cell.rate is not None else None
    if rate is None and cell.rate is not None:
        return []
    return [Unit(cell, "seed", rate, seed) for seed in seeds(recipe)]


def ready(cells: Sequence[Cell], recipe: ComparisonRecipe, lines: Mapping[str, Line]) -> Iterator[Unit]:
    """The units that can be run now; those of kind "cost" come when nothing else is left, to be run alone."""
    waiting = []
    for cell in cells:
        missing = search_of(cell, recipe, lines).missing if cell.rate is not None else []
        waiting += [Unit(cell, "trial", rate, recipe.seed) for rate in missing]
        waiting += [unit for unit in chosen(cell, recipe, lines) if unit.name not in lines]
    if not waiting and recipe.compare.cost_steps:
        waiting = [unit for unit in costs(cells, recipe, lines) if unit.name not in lines]
    yield from waiting


def costs(cells: Sequence[Cell], recipe: ComparisonRecipe, lines: Mapping[str, Line]) -> list[Unit]:
    """The units that time a few steps, each at its cell's best rate; the frozen model takes none."""
    found = [chosen(cell, recipe, lines) for cell in cells if cell.rate is not None]
    return [Unit(units[0].cell, "cost", units[0].rate, recipe.seed) for units in found if units]


def planned(cells: Sequence[Cell], recipe: ComparisonRecipe) -> int:
    """How many units there are in all."""
    of = recipe.compare
    trained = sum(cell.rate is not None for cell in cells)
    return trained * (of.trials + of.seeds + (of.cost_steps > 0)) + (len(cells) - trained) * of.seeds
