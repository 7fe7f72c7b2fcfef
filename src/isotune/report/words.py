"""Numbers and lists as people read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from isotune.comparison.results import FROZEN, FULL, Row
from isotune.intervals import Interval

NAMES = {FULL: "full fine-tuning", FROZEN: "frozen base"}


def method_name(method: str) -> str:
    """`full` and `frozen` are no methods, and are called by what they are."""
    return NAMES.get(method, method)


def row_name(row: Row) -> str:
    """The method's name, and its budget where it has one."""
    return method_name(row.method) + (f" at {row.budget:,}" if row.budget else "")


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, shown in percent."""
    return any(word in metric for word in ("accuracy", "f1", "similarity", "exact_match"))


def number(value: float | int | None, digits: int = 3) -> str:
    """With so many significant digits, thousands apart; `–` for None."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 100):
        return f"{int(value):,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{decimals}f}"


def score(metric: str, value: float | None, half_width: float | None = None, signed: bool = False) -> str:
    """`83.8 ± 0.4 %`, or `12.3 ± 0.2` for what is no share; with `signed`, a difference in points.

    Where the interval would reach beyond what the metric can be, its ends: `98.0 (93.0 to 100.0) %`.
    """
    if value is None or not math.isfinite(value):
        return "–"
    share, found = is_share(metric), Interval(value, half_width)
    scale, unit = (100, " points" if signed else " %") if share else (1, "")
    size = max(abs(value), half_width or 0) * scale
    decimals = 1 if share else max(0, 3 - (math.floor(math.log10(size)) if size else 0))
    shown, ends = f"{scale * value:{'+' if signed else ''}.{decimals}f}", found.bounds(metric, signed)
    if half_width is None or ends is None:
        spread = ""
    elif found.leaves_range(metric, signed):
        spread = f" ({' to '.join(f'{scale * end:.{decimals}f}' for end in ends)})"
    else:
        spread = f" ± {scale * half_width:.{decimals}f}"
    return f"{shown}{spread}{unit}".replace("-", "−")


def interval(metric: str, found: Interval) -> str:
    """`93.0 to 100.0 %`; `–` where there is none."""
    ends = found.bounds(metric)
    if ends is None:
        return "–"
    low, high = (score(metric, end) for end in ends)
    return f"{low.removesuffix(' %')} to {high}"


def share(value: float | None) -> str:
    """A fraction in percent, with two significant digits below ten."""
    return "–" if value is None else f"{number(100 * value, 3 if abs(value) >= 0.1 else 2)} %"


def memory(count: float | None) -> str:
    """Bytes in a unit that suits them."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return (
                f"{count:.0f} {unit}"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 100
                else f"{count:.0f} {unit}"
            )
        count /= 1024
    return f"{count:.3g} GiB"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "nothing"


def counted(count: int, thing: str, things: str | None = None) -> str:
    """`1 run`, `3 runs`."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def sentence(text: str) -> str:
    """With a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def options(given: dict[str, Any] | None) -> str:
    """`rank 4, scale 2`."""
    return ", ".join(f"{name} {value}" for name, value in (given or {}).items()) or "–"


def short(names: Sequence[str]) -> list[str]:
    """The names without the dotted beginning that all have in common."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [".".join(p) for p in parts]


def brief(names: Sequence[str]) -> list[str]:
    """Of each dotted name the shortest end that no other name has."""
    ends = [[name.split(".")[i:] for i in reversed(range(name.count(".") + 1))] for name in names]
    counts = Counter(".".join(end) for own in ends for end in own)
    return [next((text for end in own if counts[text := ".".join(end)] == 1), ".".join(own[-1])) for own in ends]
