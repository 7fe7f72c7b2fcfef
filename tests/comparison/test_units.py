"""Which runs a comparison needs, and what it makes of their results: without any training."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from isotune.comparison.plan import Cell
from isotune.comparison.recipe import ComparisonRecipe, build_comparison
from isotune.comparison.results import Line, Units
from isotune.comparison.summary import summarise
from isotune.comparison.units import Unit, planned, ready, search_of

CELLS = [
    Cell("lora", {"name": "lora", "rank": 4}, 1000, 1024, 2e-3),
    Cell("hra", {"name": "hra", "rank": 8}, 1000, 1000, 3e-3),
    Cell("full", {"name": "full"}, None, 90_000, 1e-4),
    Cell("frozen", {"name": "frozen"}, None, 0, None),
]
BEST = {"lora": 0.80, "hra": 0.85, "full": 0.84, "frozen": 0.70}


def recipe(**compare: Any) -> ComparisonRecipe:
    flags = {"model": "minilm", "data.train": "train.csv", "data.test": "test.csv", "output": "out", "seed": 5}
    section = {"methods": "lora,hra", "seeds": 3, "trials": 4, "forgetting": {"train": "other.csv", "test": "t.csv"}}
    return build_comparison(flags=flags | {f"compare.{key}": value for key, value in (section | compare).items()})


def result(unit: Unit, diverging: str = "") -> dict[str, Any]:
    """A made-up result: best at twice the method's own rate, a little noise by seed, less kept by larger steps."""
    if unit.cell.label == diverging:
        return unit.line(status="failed", error="loss is nan", seconds=1.0)
    off = abs(math.log(unit.rate / (2 * unit.cell.rate))) if unit.rate and unit.cell.rate else 0.0
    accuracy = BEST[unit.cell.label] - 0.05 * off + 0.001 * unit.seed
    metrics = {"validation_accuracy": accuracy, "seconds_per_step": 0.1, "peak_memory_bytes": 10**9}
    if unit.kind == "seed":
        metrics |= {"test_accuracy": accuracy - 0.01, "forgetting_similarity": 1 - 0.1 * accuracy, "export_rank": 8}
    return unit.line(status="done", metrics=metrics, run=f"runs/{unit.name}", seconds=1.0)


def run_all(of: ComparisonRecipe, order: int = 0, diverging: str = "") -> dict[str, Line]:
    """All units to the end, finishing in a drawn order."""
    lines: dict[str, Line] = {}
    draw = random.Random(order)
    while waiting := list(ready(CELLS, of, lines)):
        unit = draw.choice(waiting)
        assert unit.name not in lines
        lines[unit.name] = result(unit, diverging)
    return lines


def test_rates_and_rows_are_ranked_by_the_metric_that_the_recipe_names() -> None:
    """A loss that is the accuracy itself turns every order around."""
    by_loss = recipe().model_copy(update={"metric": "loss"})
    lines: dict[str, Line] = {}
    while waiting := next(ready(CELLS, by_loss, lines), None):
        line = result(waiting)
        own = {key.replace("accuracy", "loss"): value for key, value in line.metrics.items()}
        lines[waiting.name] = line.model_copy(update={"metrics": own})
    found = summarise(CELLS, by_loss, lines, {})
    assert (found.metric, found.higher_is_better) == ("loss", False)
    assert [row.method for row in found.rows] == sorted(BEST, key=lambda name: found.reference(name).mean)
    assert all(row.test_rows is None for row in found.rows)
    for row in found.rows:
        if row.learning_rates:
            assert row.learning_rates[f"{row.learning_rate:g}"] == max(row.learning_rates.values())
            assert max(row.learning_rates.values()) < 0


def test_every_method_gets_the_same_trials_and_seeds_that_took_no_part_in_them() -> None:
    lines = run_all(recipe())
    assert len(lines) == planned(CELLS, recipe()) == 3 * (4 + 3 + 1) + 3
    for label in ("lora", "hra", "full"):
        own = [line for line in lines.values() if line.method == label]
        assert [sum(line.kind == kind for line in own) for kind in ("trial", "seed", "cost")] == [4, 3, 1]
        assert {line.seed for line in own if line.kind == "trial"} == {5}
        assert {line.seed for line in own if line.kind == "seed"} == {6, 7, 8}
        multiples = [line.learning_rate / BASE[label] for line in own if line.kind == "trial"]
        assert (min(multiples), max(multiples)) == pytest.approx((0.1, 10.0))


BASE = {cell.label: cell.rate or 1.0 for cell in CELLS}


def test_what_is_run_does_not_depend_on_the_order_in_which_runs_finish() -> None:
    first = run_all(recipe())
    assert all(run_all(recipe(), order) == first for order in (1, 2))


def test_costs_come_last() -> None:
    kinds = [line.kind for line in run_all(recipe()).values()]
    assert "cost" not in kinds[: -len(CELLS) + 1]
    assert kinds[-len(CELLS) + 1 :] == ["cost"] * (len(CELLS) - 1)


def test_more_seeds_and_trials_later_keep_what_is_done() -> None:
    lines = run_all(recipe())
    more = list(ready(CELLS, recipe(seeds=4, cost_steps=0), lines))
    assert {unit.name for unit in more} == {unit.name for unit in more if unit.seed == 9}
    assert len(more) == len(CELLS)


def test_a_method_that_diverges_at_every_rate_is_left_out_and_counted() -> None:
    lines = run_all(recipe(), diverging="hra")
    assert search_of(CELLS[1], recipe(), lines).best is None
    found = summarise(CELLS, recipe(), lines, {})
    assert "hra" not in [row.method for row in found.rows]
    assert found.units.failed == 4
    assert found.without_result == ["hra at 1,000: diverged at every learning rate"]


def test_the_summary_has_means_paired_differences_and_the_front() -> None:
    found = summarise(CELLS, recipe(), run_all(recipe()), {"cpu": "a processor"})
    rows = {row.method: row for row in found.rows}
    assert list(rows) == ["hra", "full", "lora", "frozen"]
    assert rows["hra"].learning_rate == search_of(CELLS[1], recipe(), run_all(recipe())).best
    gap = rows["hra"].mean - rows["lora"].mean
    assert rows["hra"].difference.mean == pytest.approx(gap)
    assert rows["hra"].difference.half_width == pytest.approx(0, abs=1e-9)  # the same noise, seed by seed
    assert rows["hra"].half_width > 1e-3
    assert rows["lora"].difference is rows["full"].difference is rows["frozen"].difference is None
    assert {name for name, row in rows.items() if row.front} == {"hra", "frozen"}
    assert rows["hra"].seconds_per_step == 0.1
    assert rows["hra"].runs[0].startswith("runs/hra-1000-lr")
    assert found.units == Units(planned=27, done=27, failed=0)
    assert found.forgetting["similarity"].base == rows["frozen"].forgetting["similarity"].mean


def test_a_summary_of_half_a_comparison_has_the_rows_there_are() -> None:
    lines = run_all(recipe())
    half = {name: line for name, line in lines.items() if line.method != "hra" and line.kind != "cost"}
    found = summarise(CELLS, recipe(), half, {})
    assert [row.method for row in found.rows] == ["full", "lora", "frozen"]
    assert found.rows[0].seconds_per_step is None
    assert found.units.done == len(half)


def test_lines_of_other_methods_in_the_folder_do_not_count() -> None:
    lines = run_all(recipe())
    alone = [cell for cell in CELLS if cell.label in ("lora", "frozen")]
    assert summarise(alone, recipe(), lines, {}).units == Units(planned=11, done=11, failed=0)
