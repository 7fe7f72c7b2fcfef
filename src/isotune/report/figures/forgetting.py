"""Forgetting against gain: what was learned of the task over what was kept of the base."""

from __future__ import annotations

from isotune.report import words
from isotune.report.data import Comparison
from isotune.report.figures.figure import Figure, Plot, Style, axis_name, error_bar, layout, rounded, scale
from isotune.report.figures.lines import level_lines
from isotune.report.forgetting import Measure, kept, measures
from isotune.report.standings import FROZEN, mean, reference, score
from isotune.report.tables import Cell, simple


def forgetting_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each measure of forgetting."""
    return [_figure(comparison, measure, style) for measure in measures(comparison)]


def _figure(comparison: Comparison, measure: Measure, style: dict[str, Style]) -> Figure:
    metric = comparison.summary["metric"]
    frozen = reference(comparison, FROZEN)
    start = mean(frozen) if frozen else 0.0
    across, up = scale(metric), scale(measure.key)
    rows = [r for r in comparison.rows if r["values"] and r["method"] != FROZEN and kept(r, measure.key)]
    data: list[Plot] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine, own, name = [r for r in rows if r["method"] == method], style[method], words.method_name(method)
        gains = [score(row) for row in mine]
        values = [value for row in mine if (value := kept(row, measure.key)) is not None]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": name,
                "x": [rounded(across * (gain.mean - start)) for gain in gains],
                "y": [rounded(up * value.mean) for value in values],
                "error_x": error_bar([across * (gain.half_width or 0) for gain in gains], own.colour),
                "error_y": error_bar([up * (value.half_width or 0) for value in values], own.colour),
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 10},
                "text": [
                    f"{name}{_at(row)}: {words.score(metric, gain.mean - start, signed=bool(frozen))}, "
                    f"{measure.label} {words.score(measure.key, value.mean, value.half_width)}"
                    for row, gain, value in zip(mine, gains, values, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    gain_axis = f"gain over the frozen base, {axis_name(metric)}" if frozen else axis_name(metric)
    kept_axis = axis_name(measure.key)
    levels = [] if measure.base is None else [(up * measure.base, "the base itself")]
    plot = {"data": data, "layout": layout(gain_axis, kept_axis, 420, **level_lines(levels, x=0.0))}
    table = simple(
        f"Forgetting, {measure.label}",
        ["method", "budget", gain_axis, measure.label, "± (95 %)"],
        [
            [
                words.method_name(row["method"]),
                Cell(words.number(row.get("budget")), row.get("budget")),
                Cell(words.score(metric, mean(row) - start, signed=bool(frozen)), mean(row) - start),
                Cell(words.score(measure.key, value.mean), value.mean),
                Cell(words.score(measure.key, value.half_width), value.half_width),
            ]
            for row in rows
            if (value := kept(row, measure.key)) is not None
        ],
    )
    better = "higher" if measure.higher_is_better else "lower"
    title = f"{words.sentence(measure.label)} against gain ({better} forgets less)"
    return Figure(f"forgetting-{measure.key}", title, {"": plot}, table)


def _at(row: dict) -> str:
    return f" at {row['budget']:,}" if row.get("budget") else ""
