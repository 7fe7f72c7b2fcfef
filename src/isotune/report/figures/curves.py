"""Learning curves, of a comparison's rows (the mean over seeds, their spread as a band) and of single runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from isotune.comparison.results import FROZEN, FULL
from isotune.report import words
from isotune.report.data import Comparison, Json, RunResult
from isotune.report.figures.figure import Figure, Plot, Style, axis_name, layout, rounded, scale, styles, thinned
from isotune.report.tables import TableCell, simple

Points = list[tuple[float, float]]
Line = tuple[str, Style, list[Points]]


def curve_figures(comparison: Comparison, style: dict[str, Style]) -> list[Figure]:
    """One for each budget, with full fine-tuning in each."""
    curves: dict[tuple[str, Any], list[list[Json]]] = defaultdict(list)
    for unit in comparison.units:
        if unit.kind == "seed" and unit.done and unit.curve:
            curves[unit.method, unit.budget].append(unit.curve)
    figures = []
    for budget in [group.budget for group in comparison.summary.groups] or [None]:
        lines = {m: own for (m, b), own in curves.items() if m != FROZEN and (b == budget or m == FULL)}
        if lines:
            at = f" at {budget:,} parameters" if budget is not None else ""
            named = {words.method_name(method): (style[method], own) for method, own in lines.items()}
            figures.append(_figure(f"curves-{budget}", f"Learning curves{at}", comparison.summary.metric, named))
    return figures


def run_curves(runs: Sequence[RunResult]) -> list[Figure]:
    """The curves of single runs, one line each."""
    logged = [run for run in runs if any("loss" in entry or "eval_loss" in entry for entry in run.history)]
    if not logged:
        return []
    own = styles([run.name for run in logged])
    known = {key for run in logged for entry in run.history for key in entry}
    named = [run.recipe["metric"] for run in logged if run.recipe.get("metric")]
    metric = next((m for m in (*named, "accuracy", "pearson") if f"eval_{m}" in known), "perplexity")
    lines = {run.name: (own[run.name], [run.history]) for run in logged}
    return [_figure("curves-runs", "Learning curves", metric, lines)]


def points(curve: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The steps at which a value was logged, and the values."""
    return [
        (entry["step"], entry[key]) for entry in curve if isinstance(entry.get(key), int | float) and "step" in entry
    ]


def _figure(key: str, title: str, metric: str, lines: Mapping[str, tuple[Style, Sequence[Sequence[Json]]]]) -> Figure:
    plots, ends = {}, {}
    kinds = {f"validation {metric}": f"eval_{metric}", "validation loss": "eval_loss", "training loss": "loss"}
    for name, field in kinds.items():
        found = [(label, own, [points(curve, field) for curve in curves]) for label, (own, curves) in lines.items()]
        found = [(label, own, [p for p in series if p]) for label, own, series in found]
        drawn = [line for line in found if line[2]]
        if drawn:
            plots[name] = _plot(drawn, name, metric if field == f"eval_{metric}" else field)
            ends[name] = {label: _end(series) for label, _, series in drawn}
    # A single validation is no curve; it stands last.
    plots = dict(sorted(plots.items(), key=lambda item: _longest(item[1]) < 2))
    columns = list(plots)
    table = simple(
        f"{title}: the last value",
        ["", *columns],
        [
            [label, *(TableCell(words.number(ends[c].get(label), 4), ends[c].get(label)) for c in columns)]
            for label in lines
        ],
    )
    return Figure(key, title, plots, table, "Curve")


def _plot(lines: Sequence[Line], title: str, metric: str) -> Plot:
    data: list[Plot] = []
    times = scale(metric)
    for label, own, series in lines:
        at: dict[float, list[float]] = defaultdict(list)
        for one in series:
            for step, value in one:
                at[step].append(times * value)
        steps = thinned(sorted(step for step in at if len(at[step]) == len(series)) or sorted(at))
        if len(series) > 1:
            around = [*steps, *reversed(steps)]
            edge = [max(at[s]) for s in steps] + [min(at[s]) for s in reversed(steps)]
            data.append(
                {
                    "type": "scatter", "mode": "lines", "fill": "toself", "x": around,
                    "y": [rounded(v, 4) for v in edge],
                    "fillcolor": f"{own.colour}/15", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
                    "legendgroup": label,
                }
            )  # fmt: skip
        data.append(
            {
                "type": "scatter", "mode": "lines+markers" if len(steps) < 12 else "lines", "name": label,
                "x": steps, "y": [rounded(sum(at[s]) / len(at[s]), 4) for s in steps], "legendgroup": label,
                "line": {"color": own.colour, "dash": own.dash, "width": 1.75},
                "marker": {"color": own.colour, "symbol": own.symbol, "size": 6},
                "hovertemplate": f"{label}: %{{y}} at step %{{x}}<extra></extra>",
            }
        )  # fmt: skip
    axis = axis_name(title) if times == 100 else title
    return {"data": data, "layout": layout("step", axis, 400)}


def _longest(plot: Plot) -> int:
    return max(len(line["x"]) for line in plot["data"] if "name" in line)


def _end(series: Sequence[Points]) -> float:
    return sum(one[-1][1] for one in series) / len(series)
