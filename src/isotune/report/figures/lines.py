"""Ticks of logarithmic axes, and lines at levels that something is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isotune.report.figures.figure import Plot
from isotune.report.words import number


def log_axis(values: Sequence[float], most: int = 8, at: Sequence[float] = ()) -> Plot:
    """A logarithmic axis with plain numbers at round places, at most `most` of them, or at the places given."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.06 * (high - low) or 0.1
    low, high = low - margin, high + margin
    powers = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= math.log10(step) + power <= high]
        if len(ticks) <= most:
            break
    shown = at or ticks[:: math.ceil(len(ticks) / most) or 1]
    return {
        "type": "log",
        "range": [round(low, 4), round(high, 4)],
        "tickvals": [float(f"{tick:.6g}") for tick in shown],
        "ticktext": [_tick(tick) for tick in shown],
    }


def _tick(value: float) -> str:
    if 1e-3 <= value < 1e5:
        return number(value, 2).rstrip("0").rstrip(".") if "." in number(value, 2) else number(value, 2)
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def level_lines(levels: Sequence[tuple[float, str]], x: float = 1.0) -> Plot:
    """Dashed lines across a figure, each with its name above it, at `x` between the sides 0 and 1."""
    line = {"color": "@muted", "width": 1, "dash": "dash"}
    return {
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line} for y, _ in levels
        ],
        "annotations": [
            {
                "xref": "paper", "x": x, "y": y, "text": name, "showarrow": False,
                "xanchor": {0.0: "left", 1.0: "right"}.get(x, "center"), "yanchor": "bottom",
                "font": {"color": "@muted", "size": 12},
            }
            for y, name in levels
        ],
    }  # fmt: skip
