"""A comparison's figures at one budget as a table, and what they say in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.standings import Row, Summary, apart, difference, ranked, tied_with_best, worth_of_tuning
from benchmarks.tables import table
from isotune.intervals import half_width


def at_budget(summary: Summary, budget: int) -> str:
    """Table and reading at one budget."""
    rows, measures = ranked(summary, budget), summary.get("forgetting", {})
    compared = f"minus {summary['baseline']}"
    header = ["method", "parameters", "rate", summary["metric"], compared, *map(words, measures), "s a step"]
    body = [_cells(row, summary, _baseline(summary, rows)) for row in rows]
    return f"### {budget:,} parameters\n\n{table(header, body)}\n\n{reading(summary, budget)}"


def _cells(row: Row, summary: Summary, baseline: Row | None) -> list[str]:
    metric, rate, seconds = summary["metric"], row.get("learning_rate"), row.get("seconds_per_step")
    options = ", ".join(f"{key}={value}" for key, value in row.get("options", {}).items())
    return [
        f"{row['method']} {options}".strip(),
        f"{row['parameters']:,}",
        "" if rate is None else f"{rate:g}{' (edge)' if row.get('edge') else ''}",
        score(row, metric),
        "" if baseline in (None, row) else _difference(row, baseline, metric),
        *(_kept(row, key) for key in summary.get("forgetting", {})),
        "" if seconds is None else f"{seconds:.3g}",
    ]


def reading(summary: Summary, budget: int) -> str:
    """What the figures at a budget say, a sentence a line."""
    rows, metric = ranked(summary, budget), summary["metric"]
    said = [f"The best mean is {_named(rows[:1])}'s, {score(rows[0], metric)}.", *_ties(rows)]
    baseline = _baseline(summary, rows)
    if baseline is not None and len(baseline["values"]) > 1:
        said.append(_against(baseline, rows, summary["higher_is_better"]))
    said += [_kept_best(rows, key, measure) for key, measure in summary.get("forgetting", {}).items()]
    if edges := [row for row in rows if row.get("edge")]:
        said.append(f"Best at an end of the range of rates, so perhaps better than shown: {_named(edges)}.")
    if front := [row for row in rows if row.get("front")]:
        said.append(f"On the Pareto front of {metric} over parameters, all budgets together: {_named(front)}.")
    if sum(len(row.get("learning_rates", {})) > 1 for row in rows) > 1:
        rate, method = worth_of_tuning(rows)
        said.append(
            f"On the validation rows the worst of the tried rates cost a method {number(rate, metric)} (median); the "
            f"best and the worst method, each at its best rate, are {number(method, metric)} apart."
        )
    return "\n".join(f"- {sentence}" for sentence in said)


def _ties(rows: list[Row]) -> list[str]:
    tied, count = tied_with_best(rows), len(rows[0]["values"])
    behind = [row for row in rows if row not in tied]
    if count < 2:
        return ["With one seed there is no interval, and nothing is told apart."]
    if len(tied) == 1:
        return [f"The {len(behind)} others are told apart from it over {count} seeds."]
    said = [f"Not told apart from it over {count} seeds: {_named(tied[1:])}."]
    return [*said, f"Told apart, and behind: {_named(behind)}."] if behind else said


def _kept_best(rows: list[Row], key: str, measure: dict[str, Any]) -> str:
    kept = [
        {"method": row["method"], "values": row["forgetting"][key]["values"]}
        for row in rows
        if row.get("forgetting", {}).get(key)
    ]
    if not kept:
        return f"Forgetting by {words(key)} was not measured here."
    kept.sort(key=lambda row: statistics.fmean(row["values"]), reverse=measure["higher_is_better"])
    return " ".join([f"Least forgotten, by {words(key)}: {_named(kept[:1])}, {score(kept[0], key)}.", *_ties(kept)])


def _against(baseline: Row, rows: list[Row], higher_is_better: bool) -> str:
    others = [row for row in rows if row is not baseline]
    clear = [row for row in others if apart(row, baseline)]
    better = [row for row in clear if (difference(row, baseline)[0] > 0) == higher_is_better]
    worse = [row for row in clear if row not in better]
    return (
        f"Told apart from {_named([baseline])}: better {_named(better)}, worse {_named(worse)}; "
        f"{len(others) - len(clear)} of {len(others)} are not."
    )


def _baseline(summary: Summary, rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row["method"] == summary["baseline"]), None)


def _kept(row: Row, key: str) -> str:
    found = row.get("forgetting", {}).get(key)
    return score(found, key) if found and found["values"] else ""


def score(row: Row, metric: str) -> str:
    """Mean and 95 % t-interval of the row's values; the mean alone for one value."""
    values = row["values"]
    mean = number(statistics.fmean(values), metric)
    return f"{mean} ± {number(half_width(values), metric)}" if len(values) > 1 else mean


def _difference(row: Row, baseline: Row, metric: str) -> str:
    mean, half = difference(row, baseline)
    shown = f"{'+' if mean >= 0 else '-'}{number(abs(mean), metric)}"
    return shown if half is None else f"{shown} ± {number(half, metric)}"


def number(value: float, metric: str) -> str:
    """Shares in percent, other figures as they are."""
    is_share = any(word in metric for word in ("accuracy", "f1"))
    return f"{100 * value:.1f}" if is_share else f"{value:.3f}"


def words(key: str) -> str:
    """The name of a measure for people."""
    return key.replace("_", " ")


def _named(rows: Iterable[Row]) -> str:
    return ", ".join(f"`{row['method']}`" for row in rows) or "none"
