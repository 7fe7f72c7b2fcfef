"""What a score costs: over parameters and over time, with intervals and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isotune.comparison.results import FROZEN, FULL, Row
from isotune.report import words
from isotune.report.data import Comparison
from isotune.report.figures.figure import Figure, Plot, Style, axis_name, error_bar, layout, rounded, scale
from isotune.report.figures.lines import level_lines, log_axis
from isotune.report.tables import Table, TableCell, simple


@dataclass(frozen=True)
class Cost:
    """What a row cost: its key in the summary, the axis, and how it is said."""

    key: str
    axis: str
    said: Callable[[float], str]
    unit: float = 1.0

    def known(self, row: Row) -> bool:
        """Whether it was measured of the row."""
        return bool(getattr(row, self.key)) and math.isfinite(getattr(row, self.key))

    def of(self, row: Row) -> float:
        """What it was."""
        return float(getattr(row, self.key))


_MIB = 2**20
_COSTS: list[Cost] = [
    Cost("parameters", "trainable parameters", lambda v: f"{v:,.0f}"),
    Cost("seconds_per_step", "seconds a training step", words.number),
    Cost("peak_memory_bytes", "peak memory (MiB)", words.memory, 1 / _MIB),
]


def pareto_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """The score over parameters, and over time or memory, as far as at least two rows know them."""
    drawn: dict[str, tuple[Plot, Table]] = {}
    for cost in _COSTS:
        rows = [row for row in comparison.summary.rows if row.values and cost.known(row)]
        if len(rows) > 1:
            drawn[cost.key] = _plot(comparison, rows, cost, style), _table(comparison, rows, cost)
    figures = []
    if "parameters" in drawn:
        plot, table = drawn.pop("parameters")
        figures.append(Figure("pareto-parameters", "Score over trainable parameters", {"": plot}, table))
    if drawn:
        plots = {cost.axis: drawn[cost.key][0] for cost in _COSTS if cost.key in drawn}
        table = next(iter(drawn.values()))[1]
        figures.append(Figure("pareto-time", "Score over time and memory", plots, table, "Cost"))
    return figures


def front(rows: list[Row], cost: Cost, higher: bool) -> list[Row]:
    """The rows that no other beats at the same cost or less, by rising cost."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda r: (cost.of(r), -r.score.mean if higher else r.score.mean)):
        if not best or (row.score.mean > best[-1].score.mean if higher else row.score.mean < best[-1].score.mean):
            best.append(row)
    return best


def _plot(comparison: Comparison, rows: list[Row], cost: Cost, style: dict[str, Style]) -> Plot:
    metric, higher = comparison.summary.metric, comparison.summary.higher_is_better
    times, key, unit = scale(metric), cost.key, cost.unit
    # Full fine-tuning, with hundreds of times the parameters, would press all others into one spot.
    far = key == "parameters" and [row for row in rows if row.method == FULL and len(rows) > 2]
    near = [row for row in rows if not far or row.method != FULL]
    best = front(near, cost, higher)
    at = apart([unit * cost.of(row) for row in near])
    data: list[Plot] = [
        {
            "type": "scatter", "mode": "lines", "name": "Pareto front", "hoverinfo": "skip",
            "x": [unit * cost.of(row) for row in best], "y": [rounded(times * row.score.mean) for row in best],
            "line": {"color": "@muted", "shape": "hv", "width": 1.5, "dash": "dot"},
        }
    ]  # fmt: skip
    for method in dict.fromkeys(row.method for row in near):
        own, mine = style[method], sorted((r for r in near if r.method == method), key=lambda r: cost.of(r))
        found = [row.score for row in mine]
        name = words.method_name(method)
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": name,
                "x": [rounded(at[near.index(row)], 6) for row in mine], "y": [rounded(times * f.mean) for f in found],
                "error_y": error_bar(metric, found, own.colour),
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 10},
                "text": [
                    f"{name}: {words.score(metric, f.mean, f.half_width)}, {cost.said(cost.of(row))}"
                    for f, row in zip(found, mine, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    frozen = comparison.summary.reference(FROZEN)
    levels = [(times * frozen.score.mean, "frozen base")] if frozen and frozen not in rows else []
    levels += [(times * row.score.mean, f"full fine-tuning, {row.parameters:,} parameters") for row in far or ()]
    costs = [unit * cost.of(row) for row in near]
    budgets = sorted({row.budget for row in near if row.budget}) if key == "parameters" else []
    few = 1 < len(budgets) <= 5
    axis = log_axis(costs, at=budgets if few else ()) if key == "parameters" and max(costs) > 1.5 * min(costs) else {}
    return {"data": data, "layout": layout(cost.axis, axis_name(metric), 420, xaxis=axis, **level_lines(levels, 0.5))}


def apart(costs: Sequence[float]) -> list[float]:
    """The places to draw at: costs within half a percent, such as those of one budget, a little apart."""
    step = 0.02 * math.log(max(costs) / min(costs)) or 0.02
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    near: list[list[int]] = []
    for i in order:
        if near and costs[i] <= 1.005 * costs[near[-1][0]]:
            near[-1].append(i)
        else:
            near.append([i])
    places = list(costs)
    for same in near:
        middle = sum(costs[i] for i in same) / len(same)
        for rank, i in enumerate(same):
            places[i] = middle * math.exp(step * (rank - (len(same) - 1) / 2))
    return places


def _table(comparison: Comparison, rows: list[Row], cost: Cost) -> Table:
    metric, higher = comparison.summary.metric, comparison.summary.higher_is_better
    best = front(rows, cost, higher)
    return simple(
        f"Score over {cost.axis}",
        ["method", cost.axis, axis_name(metric), "95 % interval", "on the front"],
        [
            [
                words.method_name(row.method),
                TableCell(cost.said(cost.of(row)), cost.of(row)),
                TableCell(words.score(metric, row.score.mean), row.score.mean),
                TableCell(words.interval(metric, row.score), row.score.half_width),
                "yes" if row in best else "no",
            ]
            for row in sorted(rows, key=lambda r: cost.of(r))
        ],
    )
