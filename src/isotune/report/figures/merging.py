"""What a merge changed and cut off, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from isotune.merging.record import MergedAdapter
from isotune.report import words
from isotune.report.data import Weights
from isotune.report.figures.figure import Figure, Plot, layout, rounded
from isotune.report.tables import TableCell, simple


def merge_figures(weights: Sequence[Weights]) -> list[Figure]:
    """For each merged adapter the norm of each layer's change, and what its rank cut off."""
    figures = []
    for number, one in enumerate(weights):
        merge = one.merge
        if not isinstance(merge, MergedAdapter) or not merge.ranks:
            continue
        names = dict(zip(merge.ranks, words.short(list(merge.ranks)), strict=True))
        told = (("norm of the merged change", merge.norms), ("relative error of the rank", merge.errors))
        plots = {title: _bars(names, values, title) for title, values in told if any(values.values())}
        table = simple(
            f"Layers of {one.name}",
            ["layer", "rank", "norm of the change", "cut off by the rank"],
            [
                [
                    path,
                    TableCell(str(rank), rank),
                    _cell(merge.norms.get(path)),
                    _cell(merge.errors.get(path)),
                ]
                for path, rank in merge.ranks.items()
            ],
        )
        figures.append(Figure(f"merge-{number}", f"Layers of {one.name}", plots, table))
    return figures


def _bars(names: dict[str, str], values: dict[str, float], title: str) -> Plot:
    trace: Plot = {
        "type": "bar", "orientation": "h", "y": [names[path] for path in values],
        "x": [rounded(value, 4) for value in values.values()], "marker": {"color": "@1"},
        "hovertemplate": "%{y}: %{x}<extra></extra>",
    }  # fmt: skip
    axis = {"autorange": "reversed", "type": "category", "automargin": True}
    height = min(1200, 120 + 22 * len(values))
    return {"data": [trace], "layout": layout(title, "", height, yaxis=axis, showlegend=False)}


def _cell(value: float | None) -> TableCell:
    return TableCell(words.number(value), value)
