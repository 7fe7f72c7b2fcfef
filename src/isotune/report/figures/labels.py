"""What runs do with each label: scores in a table, and a map of what each label is taken for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from isotune.report import words
from isotune.report.data import RunResult
from isotune.report.figures.figure import Figure, Plot, layout, rounded
from isotune.report.tables import Table, TableCell, simple
from isotune.training.tasks.by_label import ByLabel, confused_with

MOST_LABELS = 60
"""That a map has room for."""


def label_figures(runs: Sequence[RunResult]) -> list[Figure]:
    """A map of confusions for each run that has no more labels than it has room for."""
    return [
        Figure(f"labels-{number}", title, {"share": _plot(found, True), "rows": _plot(found, False)}, table, "Cells")
        for number, (title, found, table) in enumerate(_measured(runs))
        if _mapped(found)
    ]


def label_tables(runs: Sequence[RunResult]) -> list[Table]:
    """The scores of each label, of the runs that have no map."""
    return [table for _, found, table in _measured(runs) if not _mapped(found)]


def _measured(runs: Sequence[RunResult]) -> Iterator[tuple[str, ByLabel, Table]]:
    for run in runs:
        for split in ("test", "validation"):
            if found := run.metrics.get(f"{split}_labels"):
                title = f"{run.name}: each label on the {split} rows"
                yield title, found, _table(title, found)


def _mapped(found: ByLabel) -> bool:
    return len(found) <= MOST_LABELS and all("predicted" in scores for scores in found.values())


def _plot(found: ByLabel, share: bool) -> Plot:
    """True labels down, told ones across; with `share` each line is divided by its rows."""
    names = list(found)
    grid = [[_cell(scores, told, share) for told in names] for scores in found.values()]
    unit = " %" if share else ""
    trace: Plot = {
        "type": "heatmap", "z": grid, "x": names, "y": names, "zmin": 0,
        "zmax": 100 if share else max(1, *(count or 0 for line in grid for count in line)),
        "colorscale": "@scale", "xgap": 1, "ygap": 1, "colorbar": {"thickness": 12, "ticksuffix": unit},
        "hovertemplate": f"true: %{{y}}, told: %{{x}}: %{{z}}{unit}<extra></extra>",
    }  # fmt: skip
    if len(names) <= 12:
        trace["texttemplate"] = "%{z:.3~g}"
    plain = {"type": "category", "automargin": True, "showgrid": False}
    axes: Plot = {"xaxis": plain, "yaxis": {**plain, "autorange": "reversed"}}
    return {"data": [trace], "layout": layout("told", "true", max(240, 140 + 26 * len(names)), **axes)}


def _cell(scores: dict[str, Any], told: str, share: bool) -> float | None:
    count = scores["predicted"].get(told, 0)
    if not share:
        return float(count)
    return rounded(100 * count / scores["support"], 3) if scores["support"] else None


def _table(title: str, found: ByLabel) -> Table:
    measures = ("precision", "recall", "f1")
    lines: list[list[TableCell | str]] = [
        [
            label,
            TableCell(words.number(scores["support"]), scores["support"]),
            *[TableCell(words.share(scores[name]), scores[name]) for name in measures],
            confused_with(label, scores),
        ]
        for label, scores in found.items()
    ]
    return simple(title, ["label", "support", "precision", "recall", "F1", "taken for"], lines)
