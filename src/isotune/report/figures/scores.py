"""Scores with their intervals, a row for each method: the figure that the verdict is read off."""

from __future__ import annotations

from isotune.comparison.results import FROZEN, FULL, Row, ranked
from isotune.report import words
from isotune.report.data import Comparison
from isotune.report.figures.figure import Figure, Plot, Style, axis_name, error_bar, layout, rounded, scale
from isotune.report.tables import TableCell, simple


def score_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each budget; full fine-tuning and the frozen base stand in each."""
    metric = comparison.summary.metric
    beside = [row for row in (comparison.summary.reference(FULL), comparison.summary.reference(FROZEN)) if row]
    found = comparison.summary.groups
    sets = [(group.budget, [s.row for s in group.standings]) for group in found] or [(None, [])]
    limits = _limits([row for _, rows in sets for row in (*rows, *beside)], metric)
    figures = []
    for budget, rows in sets:
        ordered = [s.row for s in ranked([*rows, *beside], comparison.summary.higher_is_better)]
        at = f" at {budget:,} parameters" if budget is not None else ""
        table = simple(
            f"Scores{at}",
            ["method", axis_name(metric), "95 % interval", "each seed"],
            [_line(row, metric) for row in ordered],
        )
        plot = _plot(ordered, metric, style, limits)
        figures.append(Figure(f"scores-{budget}", words.sentence(f"scores{at}"), {"": plot}, table))
    return figures


def _plot(rows: list[Row], metric: str, style: dict[str, Style], limits: list[float]) -> Plot:
    times, data = scale(metric), []
    for row in rows:
        own, found, name = style[row.method], row.score, words.method_name(row.method)
        data.append(
            {
                "type": "scatter", "mode": "markers", "y": [name] * len(row.values), "hoverinfo": "skip",
                "x": [rounded(times * value) for value in row.values],
                "marker": {"symbol": "line-ns-open", "size": 9, "color": own.colour, "opacity": 0.55},
            }
        )  # fmt: skip
        data.append(
            {
                "type": "scatter", "mode": "markers", "x": [rounded(times * found.mean)], "y": [name],
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 11},
                "error_x": error_bar(metric, [found], own.colour),
                "hovertemplate": f"{name}: {words.score(metric, found.mean, found.half_width)}<extra></extra>",
            }
        )  # fmt: skip
    axis = {"autorange": "reversed", "title": {"text": ""}, "automargin": True, "type": "category"}
    return {
        "data": data,
        "layout": layout(
            axis_name(metric), "", 90 + 32 * len(rows), xaxis={"range": limits}, yaxis=axis, showlegend=False
        ),
    }


def _limits(rows: list[Row], metric: str) -> list[float]:
    """A range that all figures share, so that budgets can be compared."""
    times = scale(metric)
    shown = [value for row in rows for value in (*row.values, *(row.score.bounds(metric) or ()))]
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return [round(times * (low - margin), 4), round(times * (high + margin), 4)]


def _line(row: Row, metric: str) -> list[TableCell | str]:
    found = row.score
    return [
        words.method_name(row.method),
        TableCell(words.score(metric, found.mean), found.mean),
        TableCell(words.interval(metric, found), found.half_width),
        TableCell(", ".join(words.score(metric, value) for value in row.values), found.mean),
    ]
