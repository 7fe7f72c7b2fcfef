"""The search of the learning rate: validation score over the rates tried, the chosen one marked."""

from __future__ import annotations

from isotune.comparison.results import FULL, Row
from isotune.report import words
from isotune.report.data import Comparison
from isotune.report.figures.figure import Figure, Style, axis_name, layout, rounded, scale
from isotune.report.figures.lines import log_axis
from isotune.report.tables import TableCell, simple


def rate_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each budget; full fine-tuning stands in the first."""
    rows = [row for row in comparison.summary.rows if row.learning_rates]
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    sets: dict[int | None, list[Row]] = {budget: [r for r in rows if r.budget == budget] for budget in budgets}
    if sets:
        sets[budgets[0]] += [row for row in rows if row.method == FULL]
    elif rows:
        sets[None] = rows
    return [_figure(comparison, budget, own, style) for budget, own in sets.items()]


def tried(row: Row) -> list[tuple[float, float]]:
    """The rates tried, rising, and their validation scores; trials that failed are left out."""
    found = [(float(rate), value) for rate, value in row.learning_rates.items() if value is not None]
    return sorted(found)


def _figure(comparison: Comparison, budget: int | None, rows: list[Row], style: dict[str, Style]) -> Figure:
    metric = comparison.summary.metric
    times, data = scale(metric), []
    lines: list[list[TableCell | str]] = []
    for row in rows:
        own, points, name = style[row.method], tried(row), words.method_name(row.method)
        chosen = row.learning_rate
        sizes = [13 if _same(rate, chosen) else 6 for rate, _ in points]
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": name,
                "x": [rate for rate, _ in points], "y": [rounded(times * value) for _, value in points],
                "line": {"color": own.colour, "dash": own.dash, "width": 1.5},
                "marker": {"color": own.colour, "symbol": own.symbol, "size": sizes},
                "hovertemplate": f"{name}: %{{y}} at %{{x:.3g}}<extra></extra>",
            }
        )  # fmt: skip
        lines += [
            [
                name,
                TableCell(f"{rate:.3g}", rate),
                TableCell(words.score(metric, value), value),
                _role(row, rate),
            ]
            for rate, value in points
        ]
    at = f" at {budget:,} parameters" if budget is not None else ""
    table = simple(f"Learning rates tried{at}", ["method", "learning rate", axis_name(metric), "chosen"], lines)
    axis = log_axis([rate for row in rows for rate, _ in tried(row)] or [1e-3])
    plot = {"data": data, "layout": layout("learning rate", f"validation {axis_name(metric)}", 400, xaxis=axis)}
    return Figure(f"rates-{budget}", words.sentence(f"learning rates searched{at}"), {"": plot}, table)


def _role(row: Row, rate: float) -> str:
    if not _same(rate, row.learning_rate):
        return ""
    return "yes, at an end of the range" if row.edge else "yes"


def _same(one: float, other: float | None) -> bool:
    return other is not None and abs(one - other) <= 1e-4 * abs(other)
