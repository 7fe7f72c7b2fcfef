"""Forgetting against gain: what was learned of the task over what was kept of the base."""

from __future__ import annotations

from isotune.comparison.results import FROZEN, Measure
from isotune.report import words
from isotune.report.data import Comparison
from isotune.report.figures.figure import Figure, Plot, Style, axis_name, error_bar, layout, rounded, scale
from isotune.report.figures.lines import level_lines
from isotune.report.forgetting import measures
from isotune.report.tables import TableCell, simple


def forgetting_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each measure of forgetting."""
    return [_figure(comparison, key, measure, style) for key, measure in measures(comparison).items()]


def _figure(comparison: Comparison, key: str, measure: Measure, style: dict[str, Style]) -> Figure:
    metric = comparison.summary.metric
    frozen = comparison.summary.reference(FROZEN)
    start = frozen.score.mean if frozen else 0.0
    across, up = scale(metric), scale(key)
    rows = [r for r in comparison.summary.rows if r.values and r.method != FROZEN and key in r.forgetting]
    data: list[Plot] = []
    for method in dict.fromkeys(row.method for row in rows):
        mine, own, name = [r for r in rows if r.method == method], style[method], words.method_name(method)
        gains = [row.score for row in mine]
        values = [row.forgetting[key] for row in mine]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": name,
                "x": [rounded(across * (gain.mean - start)) for gain in gains],
                "y": [rounded(up * value.mean) for value in values],
                "error_x": error_bar(metric, gains, own.colour),
                "error_y": error_bar(key, values, own.colour),
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 10},
                "text": [
                    f"{words.row_name(row)}: {words.score(metric, gain.mean - start, signed=bool(frozen))}, "
                    f"{measure.label} {words.score(key, value.mean, value.half_width)}"
                    for row, gain, value in zip(mine, gains, values, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    gain_axis = f"gain over the frozen base, {axis_name(metric)}" if frozen else axis_name(metric)
    kept_axis = axis_name(key)
    levels = [] if measure.base is None else [(up * measure.base, "the base itself")]
    plot = {"data": data, "layout": layout(gain_axis, kept_axis, 420, **level_lines(levels, x=0.0))}
    table = simple(
        f"Forgetting, {measure.label}",
        ["method", "budget", gain_axis, measure.label, "95 % interval"],
        [
            [
                words.method_name(row.method),
                TableCell(words.number(row.budget), row.budget),
                TableCell(words.score(metric, row.score.mean - start, signed=bool(frozen)), row.score.mean - start),
                TableCell(words.score(key, value.mean), value.mean),
                TableCell(words.interval(key, value), value.half_width),
            ]
            for row, value in ((row, row.forgetting[key]) for row in rows)
        ],
    )
    better = "higher" if measure.higher_is_better else "lower"
    title = f"{words.sentence(measure.label)} against gain ({better} forgets less)"
    return Figure(f"forgetting-{key}", title, {"": plot}, table)
