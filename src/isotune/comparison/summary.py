"""From the lines of a comparison to its summary: intervals, paired differences and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotune.comparison.equal_scores import equal_scores
from isotune.comparison.plan import Cell
from isotune.comparison.recipe import ComparisonRecipe
from isotune.comparison.results import FROZEN, Line, Measure, Row, Summary, Units
from isotune.comparison.units import chosen, costs, planned, search_of
from isotune.intervals import Interval, paired
from isotune.training.forgetting import HIGHER_IS_BETTER
from isotune.training.tasks.contract import higher_is_better
from isotune.training.tasks.names import TASKS, metric_of

COSTS = ("seconds_per_step", "tokens_per_second", "peak_memory_bytes")
"""Measured alone, when all runs are done."""
_STORED = ("adapter_bytes", "export_rank")


def summarise(
    cells: Sequence[Cell], recipe: ComparisonRecipe, lines: Mapping[str, Line], environment: Mapping[str, Any]
) -> Summary:
    """The summary of what is known so far; rows come best first."""
    metric = metric_of(recipe.task, recipe.metric)
    higher = higher_is_better(metric)
    rows = [row for cell in cells if (row := _row(cell, recipe, lines, metric)) is not None]
    for row in rows:
        others = [one for one in rows if one.method == recipe.baseline and one.budget == row.budget]
        row.difference = (
            paired(row.by_seed, others[0].by_seed, row.test_rows) if others and others[0] is not row else None
        )
        row.front = not any(_dominates(other, row, higher) for other in rows)
    if recipe.compare.forgetting is not None and recipe.compare.forgetting.points:
        for row, found in equal_scores(rows, lines.values(), metric, higher):
            row.forgetting_at = found
    rows.sort(key=lambda row: row.score.mean, reverse=higher)
    done = belonging(cells, recipe, lines)
    succeeded = sum(line.done for line in done)
    return Summary(
        task=recipe.task,
        model=Path(recipe.model).name,
        targets=recipe.targets or "the usual ones of each method",
        metric=metric,
        higher_is_better=higher,
        baseline=recipe.baseline,
        seeds=recipe.compare.seeds,
        trials=recipe.compare.trials,
        span=list(recipe.compare.span),
        units=Units(planned=planned(cells, recipe), done=succeeded, failed=len(done) - succeeded),
        seconds=round(sum(line.seconds for line in done), 1),
        forgetting=_held_out(recipe, rows),
        rows=rows,
        without_result=[_place(cell) for cell in cells if _diverged(cell, recipe, lines)],
        environment=dict(environment),
    )


def _row(cell: Cell, recipe: ComparisonRecipe, lines: Mapping[str, Line], metric: str) -> Row | None:
    """The row of a cell; None before any of its seeds is done."""
    units = chosen(cell, recipe, lines)
    ended = [lines[unit.name] for unit in units if unit.name in lines]
    done = [line for line in ended if line.done]
    if not done:
        return None
    search = search_of(cell, recipe, lines) if cell.rate is not None else None
    rate = units[0].rate
    timed = [lines[unit.name].metrics for unit in costs([cell], recipe, lines) if unit.name in lines]
    kept = [name for name in done[0].metrics if name.startswith("forgetting_")]
    return Row(
        method=cell.label,
        budget=cell.budget,
        options=cell.options,
        parameters=cell.parameters,
        learning_rate=rate,
        learning_rates={f"{tried:g}": score for tried, score in search.scores.items()} if search else {},
        edge=search is not None and len(search.scores) > 1 and rate in (min(search.scores), max(search.scores)),
        seeds=[line.seed for line in done],
        values=[line.metrics[f"test_{metric}"] for line in done],
        test_rows=done[-1].metrics.get("test_rows") if metric in TASKS[recipe.task].counted else None,
        forgetting={
            name.removeprefix("forgetting_"): Interval.of([line.metrics[name] for line in done]) for name in kept
        },
        **{name: timed[0].get(name) for name in COSTS if timed},
        **{name: done[-1].metrics.get(name) for name in _STORED},
        runs=[line.run for line in done if line.run is not None],
        failed=[line.error for line in ended if not line.done],
    )


def _dominates(other: Row, row: Row, higher: bool) -> bool:
    """Whether `other` is better with fewer parameters: as good in both, and better in one."""
    sign = 1 if higher else -1
    gain, saved = sign * (other.score.mean - row.score.mean), (row.parameters or 0) - (other.parameters or 0)
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def _held_out(recipe: ComparisonRecipe, rows: Sequence[Row]) -> dict[str, Measure]:
    """What was measured of forgetting, and what the base itself has."""
    settings = recipe.compare.forgetting
    if settings is None or not rows:
        return {}
    base = next((row.forgetting for row in rows if row.method == FROZEN), {})
    rows_of = "/".join(Path(settings.train or str(settings.test)).parts[-2:])
    about = {
        "probe_accuracy": f"accuracy of a linear probe on {rows_of}",
        "similarity": f"cosine with the base's embeddings of {rows_of}",
        "perplexity": f"perplexity on {rows_of}",
    }
    return {
        name: Measure(
            label=about[name],
            base=base[name].mean if name in base else None,
            higher_is_better=HIGHER_IS_BETTER[name],
        )
        for name in rows[0].forgetting
    }


def _diverged(cell: Cell, recipe: ComparisonRecipe, lines: Mapping[str, Line]) -> bool:
    if cell.rate is None:
        return False
    search = search_of(cell, recipe, lines)
    return search.finished and search.best is None


def _place(cell: Cell) -> str:
    at = "" if cell.budget is None else f" at {cell.budget:,}"
    return f"{cell.label}{at}: diverged at every learning rate"


def belonging(cells: Sequence[Cell], recipe: ComparisonRecipe, lines: Mapping[str, Line]) -> list[Line]:
    """The lines that belong to this plan; a folder may hold more, from other methods or budgets."""
    keys = {(cell.label, cell.budget) for cell in cells}
    names = {unit.name for cell in cells for unit in chosen(cell, recipe, lines)}
    return [
        line
        for line in lines.values()
        if (line.method, line.budget) in keys and (line.kind != "seed" or line.unit in names)
    ]
