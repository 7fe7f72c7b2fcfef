"""Forgetting against gain, at the end of the runs and along them: what was learned over what was kept of the base."""

from __future__ import annotations

from collections import defaultdict

from isotune.comparison.equal_scores import along
from isotune.comparison.results import FROZEN, Measure, Row
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


def along_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each measure at each budget at which runs were measured along the way."""
    return [
        _along(comparison, key, measure, budget, rows, style)
        for key, measure in measures(comparison).items()
        for budget, rows in _measured_along(comparison, key).items()
    ]


def _measured_along(comparison: Comparison, key: str) -> dict[int | None, list[Row]]:
    at = defaultdict(list)
    for row in comparison.summary.rows:
        if row.forgetting_at is not None and key in row.forgetting_at.forgetting:
            at[row.budget].append(row)
    return at


def _along(
    comparison: Comparison, key: str, measure: Measure, budget: int | None, rows: list[Row], style: dict[str, Style]
) -> Figure:
    """The path of each row, the mean over its seeds, with a line at the score that all of them reach."""
    metric = comparison.summary.metric
    across, up = scale(metric), scale(key)
    data: list[Plot] = []
    for row in rows:
        own, name = style[row.method], words.method_name(row.method)
        by_step = defaultdict(list)
        for unit in comparison.units:
            if unit.kind == "seed" and (unit.method, unit.budget) == (row.method, budget) and unit.seed in row.seeds:
                for point in along(unit, metric):
                    by_step[point.step].append((point.score, point.forgetting[key]))
        steps = sorted(by_step)
        means = [[sum(values) / len(values) for values in zip(*by_step[step], strict=True)] for step in steps]
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": name,
                "x": [rounded(across * score, 4) for score, _ in means],
                "y": [rounded(up * kept, 4) for _, kept in means],
                "line": {"color": own.colour, "dash": own.dash, "width": 1.75},
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 6},
                "text": [f"{name}, step {step:g}" for step in steps],
                "hovertemplate": "%{text}: %{x}, %{y}<extra></extra>",
            }
        )  # fmt: skip
    equal = [row.forgetting_at for row in rows if row.forgetting_at is not None]
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": rounded(across * equal[0].score, 4), "y0": 0, "y1": 1}
    shape = line | {"x1": line["x0"], "line": {"dash": "dot", "width": 1}}
    axis = f"validation {metric}"
    shown = axis_name(axis) if across == 100 else axis
    table = simple(
        f"{words.sentence(measure.label)}, where the {axis} is {words.score(metric, equal[0].score)}",
        ["method", "at step", measure.label, "95 % interval", "seeds that do not pass there"],
        [
            [
                words.method_name(row.method),
                TableCell(words.number(found.steps.mean), found.steps.mean),
                TableCell(words.score(key, value.mean), value.mean),
                TableCell(words.interval(key, value), value.half_width),
                TableCell(f"{found.beyond} of {len(value.values)}", found.beyond),
            ]
            for row, found in zip(rows, equal, strict=True)
            for value in (found.forgetting[key],)
        ],
    )
    at = f" at {budget:,} parameters" if budget is not None else ""
    title = f"{words.sentence(measure.label)} along the runs{at}"
    plot = {"data": data, "layout": layout(shown, axis_name(key), 420, shapes=[shape])}
    return Figure(f"forgetting-along-{key}-{budget}", title, {"": plot}, table)
