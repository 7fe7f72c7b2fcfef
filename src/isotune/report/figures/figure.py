"""What a figure is, and the styles that all figures share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isotune.comparison.results import FROZEN, FULL
from isotune.intervals import Interval, range_of
from isotune.report.tables import Table

Plot = dict[str, Any]

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "hexagon2")
DASHES = ("solid", "dash", "dot", "dashdot")
COLOURS = 8


@dataclass(frozen=True)
class Figure:
    """One figure, or several of which the reader chooses one."""

    key: str
    title: str
    plots: dict[str, Plot]
    """By the name in the chooser; one alone has none."""
    table: Table | None = None
    """The same in words and numbers, beneath the figure."""
    choose: str = "Show"
    """What the chooser chooses."""
    chosen: str = ""
    """What it has chosen at first; by default the first."""


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure: by colour, and by shape for whoever cannot tell the colours."""

    colour: str
    symbol: str
    dash: str


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method, in their order; full fine-tuning and the frozen base have their own."""
    found = {FULL: Style("@ink", "star", "solid"), FROZEN: Style("@muted", "x", "dot")}
    drawn = [method for method in dict.fromkeys(methods) if method not in found]
    for index, method in enumerate(drawn):
        turn = index // COLOURS
        symbol = SYMBOLS[index % COLOURS] + ("-open" if turn % 2 else "")
        found[method] = Style(f"@{index % COLOURS + 1}", symbol, DASHES[turn % len(DASHES)])
    return found


def layout(x: str, y: str, height: int = 360, **more: Any) -> Plot:
    """A layout with titled axes; `xaxis` and `yaxis` in `more` are added to them."""
    own = {key: more.pop(key, {}) for key in ("xaxis", "yaxis")}
    return {
        "height": height,
        "xaxis": {"title": {"text": x}, **own["xaxis"]},
        "yaxis": {"title": {"text": y}, **own["yaxis"]},
        **more,
    }


def error_bar(metric: str, found: Sequence[Interval], colour: str) -> Plot:
    """Intervals within what the metric can be; none is drawn where it is not known."""
    least, most = range_of(metric)
    halves = [one.half_width or 0 for one in found]
    up = [scale(metric) * min(half, max(0.0, most - one.mean)) for one, half in zip(found, halves, strict=True)]
    down = [scale(metric) * min(half, max(0.0, one.mean - least)) for one, half in zip(found, halves, strict=True)]
    bar: Plot = {"type": "data", "array": up, "color": colour, "thickness": 1.5, "width": 4}
    return bar if up == down else {**bar, "symmetric": False, "arrayminus": down}


def rounded(value: float | None, digits: int = 5) -> float | None:
    """With so many significant digits, which keeps the page small; None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def thinned(points: Sequence[Any], most: int = 80) -> list[Any]:
    """At most `most` of the points, evenly, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def scale(metric: str) -> float:
    """100 for what is shown in percent, else 1."""
    from isotune.report.words import is_share

    return 100.0 if is_share(metric) else 1.0


def axis_name(metric: str) -> str:
    """`accuracy (%)`."""
    return metric.replace("_", " ") + (" (%)" if scale(metric) == 100 else "")
