"""What a score costs: over parameters and over time, with intervals and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable

from isotune.report import words
from isotune.report.data import Comparison, Json
from isotune.report.figures.figure import Figure, Plot, Style, axis_name, error_bar, layout, rounded, scale
from isotune.report.standings import FROZEN, mean, reference, score
from isotune.report.tables import Cell, simple

_COSTS: list[tuple[str, str, str, Callable[[float], str]]] = [
    ("parameters", "Score over trainable parameters", "trainable parameters", lambda v: f"{v:,.0f}"),
    ("seconds_per_step", "Score over time", "seconds a training step", words.number),
    ("peak_memory_bytes", "Score over peak memory", "peak memory (bytes)", words.memory),
]


def pareto_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each cost that at least two rows know."""
    figures = []
    for key, title, axis, said in _COSTS:
        rows = [row for row in comparison.rows if row["values"] and row.get(key)]
        if len(rows) > 1:
            figures.append(_figure(comparison, rows, key, title, axis, said, style))
    return figures


def front(rows: list[Json], key: str, higher: bool) -> list[Json]:
    """The rows that no other beats at the same cost or less, by rising cost."""
    best: list[Json] = []
    for row in sorted(rows, key=lambda r: (r[key], -mean(r) if higher else mean(r))):
        if not best or (mean(row) > mean(best[-1]) if higher else mean(row) < mean(best[-1])):
            best.append(row)
    return best


def _figure(
    comparison: Comparison,
    rows: list[Json],
    key: str,
    title: str,
    axis: str,
    said: Callable[[float], str],
    style: dict[str, Style],
) -> Figure:
    metric, higher = comparison.summary["metric"], comparison.summary.get("higher_is_better", True)
    best, times = front(rows, key, higher), scale(metric)
    data: list[Plot] = [
        {
            "type": "scatter", "mode": "lines", "name": "Pareto front", "hoverinfo": "skip",
            "x": [row[key] for row in best], "y": [rounded(times * mean(row)) for row in best],
            "line": {"color": "@muted", "shape": "hv", "width": 1.5, "dash": "dot"},
        }
    ]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        own, mine = style[method], sorted((r for r in rows if r["method"] == method), key=lambda r: r[key])
        found = [score(row) for row in mine]
        name = words.method_name(method)
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": name,
                "x": [row[key] for row in mine], "y": [rounded(times * f.mean) for f in found],
                "error_y": error_bar([times * (f.half_width or 0) for f in found], own.colour),
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 10},
                "text": [
                    f"{name}: {words.score(metric, f.mean, f.half_width)}, {said(row[key])}"
                    for f, row in zip(found, mine, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    plot = {"data": data, "layout": layout(axis, axis_name(metric), 420, xaxis=_axis(rows, key))}
    frozen = reference(comparison, FROZEN)
    if frozen and frozen not in rows:
        plot["layout"] |= _level(times * mean(frozen))
    table = simple(
        title,
        ["method", axis, axis_name(metric), "± (95 %)", "on the front"],
        [
            [
                words.method_name(row["method"]),
                Cell(said(row[key]), row[key]),
                Cell(words.score(metric, mean(row)), mean(row)),
                Cell(words.score(metric, score(row).half_width), score(row).half_width),
                "yes" if row in best else "no",
            ]
            for row in sorted(rows, key=lambda r: r[key])
        ],
    )
    return Figure(f"pareto-{key}", title, {"": plot}, table)


def _axis(rows: list[Json], key: str) -> Plot:
    costs = [row[key] for row in rows]
    return {"type": "log", "dtick": 1} if max(costs) > 20 * min(costs) else {"rangemode": "normal"}


def _level(value: float) -> Plot:
    """A line at the frozen base's score, which has no trainable parameters to stand over."""
    return {
        "shapes": [
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value,
                "line": {"color": "@muted", "width": 1, "dash": "dash"},
            }
        ],
        "annotations": [
            {
                "xref": "paper", "x": 1, "y": value, "text": "frozen base", "showarrow": False,
                "xanchor": "right", "yanchor": "bottom", "font": {"color": "@muted", "size": 12},
            }
        ],
    }  # fmt: skip
