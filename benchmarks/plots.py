"""A log-log line plot as SVG text: the same points give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Series = dict[str, list[tuple[float, float]]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 64, 120, 34, 44
COLOURS = ("#888888", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def log_log(title: str, x_label: str, y_label: str, series: Series) -> str:
    """Lines with a point at each value, labelled at their right end. Values have to be positive."""
    series = {name: points for name, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_of = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    low, high = _decades(min(ys), max(ys))
    y_of = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=13),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, anchor="middle"),
        _text(12, TOP - 6, y_label, size=10),
    ]
    for x in sorted(set(xs)):
        parts.append(_line(x_of(x), TOP, x_of(x), HEIGHT - BOTTOM))
        parts.append(_text(x_of(x), HEIGHT - BOTTOM + 14, f"{x:g}", size=9, anchor="middle"))
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = y_of(10.0**power)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(LEFT - 6, y + 3, f"1e{power}", size=9, anchor="end"))
    labels = _apart({name: y_of(points[-1][1]) for name, points in series.items()})
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        parts += _curve([(x_of(x), y_of(y)) for x, y in points], colour)
        parts.append(_text(WIDTH - RIGHT + 10, labels[name] + 4, name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _curve(points: Sequence[tuple[float, float]], colour: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    return [line, *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _decades(low: float, high: float) -> tuple[float, float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


def _apart(heights: dict[str, float], gap: float = 13) -> dict[str, float]:
    """Label heights at least `gap` apart, in the same order."""
    moved: dict[str, float] = {}
    previous = -math.inf
    for name in sorted(heights, key=heights.__getitem__):
        previous = moved[name] = max(heights[name], previous + gap)
    return moved


def _text(x: float, y: float, text: str, size: int = 11, anchor: str = "start", colour: str = "#222222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e5e5e5"/>'
