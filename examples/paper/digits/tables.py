"""The results as Markdown: means over seeds with 95 % t-intervals, and what HRA has more than each, by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from contenders import SEARCH_SEED, Row

from isotune.intervals import Interval, paired

SUBJECT = {
    "subject": "subject, %", "likeness": "likeness", "diversity": "diversity", "edited": "others in its look, %",
    "digit": "its digit plain, %", "others": "others plain, %", "loss": "their loss, times the base's",
}  # fmt: skip
TWO = {
    "three alone": "three alone, %", "three of both": "three of both, %", "seven alone": "seven alone, %",
    "seven of both": "seven of both, %", "plain": "all digits plain, %",
}  # fmt: skip
CONDITION = {"iou": "IoU of outlines, %", "error": "pixel error", "digit": "right digit, %"}
Groups = dict[str, dict[int, Row]]


def grouped(rows: Mapping[str, Row], experiment: str) -> Groups:
    """By what was run, the rows of each seed that is reported."""
    found: Groups = {}
    for key, row in rows.items():
        kind, method, *rest, seed = key.split("/")
        if kind == experiment and (int(seed) != SEARCH_SEED):
            prior = {"prior": "with prior", "alone": "without"}.get(rest[-1], "") if rest else ""
            found.setdefault(f"{method}, {prior}".strip(", "), {})[int(seed)] = row
    return found


def shown(name: str, heading: str, values: Iterable[float]) -> str:
    """A mean and its interval, as per cent where the heading says so."""
    scale, digits = (100, 0) if heading.endswith("%") else (1, 3 if name in ("error", "likeness") else 2)
    interval = Interval.of([scale * value for value in values])
    half = "" if interval.half_width is None else f" ± {interval.half_width:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def table(groups: Groups, columns: Mapping[str, str], reference: Row | None = None) -> str:
    """A line for each group; `reference` is what real pictures have."""
    lines = [
        f"| | rate | numbers | {' | '.join(columns.values())} |",
        f"| --- | ---: | ---: |{' ---: |' * len(columns)}",
    ]
    if reference is not None:
        cells = [shown(n, h, [reference[n]]) if n in reference else "" for n, h in columns.items()]
        lines.append(f"| real pictures | | | {' | '.join(cells)} |")
    for name, by_seed in groups.items():
        rows = list(by_seed.values())
        rate = f"x {rows[0]['multiple']:g}" if "multiple" in rows[0] else ""
        numbers = f"{rows[0]['numbers']:,}" if "numbers" in rows[0] else ""
        cells = [shown(n, h, [row[n] for row in rows]) for n, h in columns.items()]
        lines.append(f"| {name} | {rate} | {numbers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(groups: Groups, columns: Mapping[str, str], ours: str) -> str:
    """What `ours` has more than each other group, paired by seed; in bold where the interval leaves zero out."""
    lines = [f"| {ours} less | {' | '.join(columns.values())} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, by_seed in groups.items():
        if name == ours or ours not in groups or name.partition(", ")[2] != ours.partition(", ")[2]:
            continue
        cells = []
        for n, heading in columns.items():
            ends = ({seed: row[n] for seed, row in rows.items()} for rows in (groups[ours], by_seed))
            found = paired(*ends)
            text = shown(n, heading, found.values) if found else ""
            cells.append(f"**{text}**" if found and not found.holds_zero else text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
