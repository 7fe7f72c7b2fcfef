"""What a comparison found: a row for each cell, with intervals, paired differences and the Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotune.comparison.plan import Cell
from isotune.comparison.recipe import FROZEN, ComparisonRecipe
from isotune.comparison.store import Line
from isotune.comparison.units import chosen, costs, planned, search_of
from isotune.intervals import Mean
from isotune.training.forgetting import HIGHER_IS_BETTER

CONFIDENCE = "95 % t-interval over seeds"
COSTS = ("seconds_per_step", "tokens_per_second", "peak_memory_bytes")
"""Measured alone, when all runs are done."""
_STORED = ("adapter_bytes", "export_rank")

Row = dict[str, Any]


def summarise(
    cells: Sequence[Cell], recipe: ComparisonRecipe, lines: Mapping[str, Line], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of what is known so far, as plain values; rows come best first."""
    metric, higher = ("accuracy", True) if recipe.task == "classification" else ("loss", False)
    rows = [row for cell in cells if (row := _row(cell, recipe, lines, f"test_{metric}")) is not None]
    for row in rows:
        others = [one for one in rows if one["method"] == recipe.baseline and one["budget"] == row["budget"]]
        row["difference"] = _difference(row, others[0]) if others and others[0] is not row else None
        row["front"] = not any(_dominates(other, row, higher) for other in rows)
    rows.sort(key=lambda row: -row["mean"] if higher else row["mean"])
    done = belonging(cells, recipe, lines)
    return {
        "task": recipe.task,
        "model": Path(recipe.model).name,
        "targets": recipe.targets,
        "metric": metric,
        "higher_is_better": higher,
        "baseline": recipe.baseline,
        "confidence": CONFIDENCE,
        "seeds": recipe.compare.seeds,
        "trials": recipe.compare.trials,
        "span": list(recipe.compare.span),
        "units": {
            "planned": planned(cells, recipe),
            "done": sum(line["status"] == "done" for line in done),
            "failed": sum(line["status"] == "failed" for line in done),
        },
        "seconds": round(sum(line["seconds"] for line in done), 1),
        "forgetting": _held_out(recipe, rows),
        "rows": rows,
        "without_result": [_place(cell) for cell in cells if _diverged(cell, recipe, lines)],
        "environment": dict(environment),
    }


def _row(cell: Cell, recipe: ComparisonRecipe, lines: Mapping[str, Line], metric: str) -> Row | None:
    """The row of a cell; None before any of its seeds is done."""
    units = chosen(cell, recipe, lines)
    found = [lines[unit.name] for unit in units if unit.name in lines and lines[unit.name]["status"] == "done"]
    if not found:
        return None
    search = search_of(cell, recipe, lines) if cell.rate is not None else None
    rate = units[0].rate
    timed = [lines[unit.name]["metrics"] for unit in costs([cell], recipe, lines) if unit.name in lines]
    last = found[-1]["metrics"]
    return {
        "method": cell.label,
        "budget": cell.budget,
        "options": cell.options,
        "parameters": cell.parameters,
        "learning_rate": rate,
        "learning_rates": {f"{tried:g}": score for tried, score in search.scores.items()} if search else {},
        "edge": search is not None and len(search.scores) > 1 and rate in (min(search.scores), max(search.scores)),
        "seeds": [line["seed"] for line in found],
        **Mean.of([line["metrics"][metric] for line in found]).as_dict(),
        "forgetting": _forgotten(found),
        **{name: timed[0].get(name) if timed else None for name in COSTS},
        **{name: last.get(name) for name in _STORED},
        "runs": [line["run"] for line in found if line["run"] is not None],
        "failed": [lines[unit.name]["error"] for unit in units if lines.get(unit.name, {}).get("status") == "failed"],
    }


def _forgotten(found: Sequence[Line]) -> dict[str, Any]:
    names = [name for name in found[0]["metrics"] if name.startswith("forgetting_")]
    return {
        name.removeprefix("forgetting_"): Mean.of([line["metrics"][name] for line in found]).as_dict()
        for name in names
    }


def _difference(row: Row, baseline: Row) -> dict[str, Any] | None:
    """The paired difference to the baseline, over the seeds that both have."""
    others = dict(zip(baseline["seeds"], baseline["values"], strict=True))
    pairs = zip(row["seeds"], row["values"], strict=True)
    differences = [value - others[seed] for seed, value in pairs if seed in others]
    return Mean.of(differences).as_dict() if differences else None


def _dominates(other: Row, row: Row, higher: bool) -> bool:
    """Whether `other` is better with fewer parameters: as good in both, and better in one."""
    sign = 1 if higher else -1
    gain, saved = sign * (other["mean"] - row["mean"]), row["parameters"] - other["parameters"]
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def _held_out(recipe: ComparisonRecipe, rows: Sequence[Row]) -> dict[str, Any]:
    """What was measured of forgetting, and what the base itself has."""
    settings = recipe.compare.forgetting
    if settings is None or not rows:
        return {}
    base: dict[str, Any] = next((row["forgetting"] for row in rows if row["method"] == FROZEN), {})
    rows_of = "/".join(Path(settings.train or str(settings.test)).parts[-2:])
    about = {
        "probe_accuracy": f"accuracy of a linear probe on {rows_of}",
        "similarity": f"cosine with the base's embeddings of {rows_of}",
        "perplexity": f"perplexity on {rows_of}",
    }
    return {
        name: {
            "base": statistics.fmean(base[name]["values"]) if name in base else None,
            "higher_is_better": HIGHER_IS_BETTER[name],
            "label": about[name],
        }
        for name in rows[0]["forgetting"]
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
        if (line["method"], line["budget"]) in keys and (line["kind"] != "seed" or line["unit"] in names)
    ]
