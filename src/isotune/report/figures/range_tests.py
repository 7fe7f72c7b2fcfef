"""The range tests by which runs found their learning rates: what was gained before the step at each rate."""

from __future__ import annotations

from collections.abc import Sequence

from isotune.report.data import RunResult
from isotune.report.figures.figure import Figure, layout, rounded, styles
from isotune.report.figures.lines import log_axis
from isotune.report.tables import TableCell, simple
from isotune.training.range_test import RangeTest, smoothed


def range_test_figures(runs: Sequence[RunResult]) -> list[Figure]:
    """One, with a line for each run that had a range test."""
    found = {run.name: run.range_test for run in runs if run.range_test is not None}
    if not found:
        return []
    own, data = styles(list(found)), []
    lines: list[list[TableCell | str]] = []
    for name, test in found.items():
        style, gains = own[name], smoothed(test.gains)
        taken = {"color": style.colour, "dash": "dot", "width": 1}
        data += [
            {
                "type": "scatter", "mode": "lines", "name": name,
                "x": [rounded(rate) for rate in test.rates], "y": [rounded(gain) for gain in gains],
                "line": {"color": style.colour, "dash": style.dash, "width": 1.5},
                "hovertemplate": f"{name}: %{{y}} at %{{x:.3g}}<extra></extra>",
            },
            {
                "type": "scatter", "mode": "lines", "name": f"{name}: taken", "showlegend": False,
                "x": [test.rate, test.rate], "y": [rounded(min(gains)), rounded(max(gains))], "line": taken,
                "hovertemplate": f"{name}: {test.rate:.3g} was taken<extra></extra>",
            },
        ]  # fmt: skip
        lines.append([name, TableCell(f"{test.rate:.3g}", test.rate), *_top(test, gains)])
    heads = ["run", "rate taken", "rate at the largest gain", "largest gain"]
    table = simple("Range tests", heads, lines)
    axis = log_axis([rate for test in found.values() for rate in test.rates])
    plot = {"data": data, "layout": layout("learning rate", "loss gained", 400, xaxis=axis)}
    return [Figure("range-tests", "Range tests", {"": plot}, table)]


def _top(test: RangeTest, gains: list[float]) -> list[TableCell | str]:
    top = max(range(len(gains)), key=gains.__getitem__)
    return [TableCell(f"{test.rates[top]:.3g}", test.rates[top]), TableCell(f"{gains[top]:.3g}", gains[top])]
