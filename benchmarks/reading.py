"""A comparison's figures at one budget as a table, and what they say in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.standings import worth_of_tuning
from benchmarks.tables import table
from isotune.comparison.results import Group, Measure, Row, Standing, Summary, lead, ranked
from isotune.intervals import Interval


def at_budget(summary: Summary, group: Group) -> str:
    """Table and reading at one budget."""
    compared = f"minus {summary.baseline}"
    header = ["method", "parameters", "rate", summary.metric, compared, *map(words, summary.forgetting), "s a step"]
    body = [_cells(standing.row, summary) for standing in group.standings]
    return f"### {group.budget:,} parameters\n\n{table(header, body)}\n\n{reading(summary, group)}"


def _cells(row: Row, summary: Summary) -> list[str]:
    options = ", ".join(f"{key}={value}" for key, value in row.options.items())
    return [
        f"{row.method} {options}".strip(),
        f"{row.parameters:,}",
        "" if row.learning_rate is None else f"{row.learning_rate:g}{' (edge)' if row.edge else ''}",
        score(row.score, summary.metric),
        score(row.difference, summary.metric, signed=True),
        *(score(row.forgetting.get(key), key) for key in summary.forgetting),
        "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
    ]


def reading(summary: Summary, group: Group) -> str:
    """What the figures at a budget say, a sentence a line."""
    rows, metric = [standing.row for standing in group.standings], summary.metric
    said = [f"The best mean is {_named(rows[:1])}'s, {score(rows[0].score, metric)}.", *_ties(group.standings)]
    baseline = next((row for row in rows if row.method == summary.baseline), None)
    if baseline is not None and len(baseline.values) > 1:
        said.append(_against(baseline, rows, summary.higher_is_better))
    said += [_kept_best(rows, key, measure) for key, measure in summary.forgetting.items()]
    if edges := [row for row in rows if row.edge]:
        said.append(f"Best at an end of the range of rates, so perhaps better than shown: {_named(edges)}.")
    if front := [row for row in rows if row.front]:
        said.append(f"On the Pareto front of {metric} over parameters, all budgets together: {_named(front)}.")
    if sum(len(row.learning_rates) > 1 for row in rows) > 1:
        rate, method = worth_of_tuning(rows)
        said.append(
            f"On the validation rows the worst of the tried rates cost a method {number(rate, metric)} (median); the "
            f"best and the worst method, each at its best rate, are {number(method, metric)} apart."
        )
    return "\n".join(f"- {sentence}" for sentence in said)


def _ties(standings: Sequence[Standing]) -> list[str]:
    best, *others = standings
    tied, behind = ([one.row for one in others if one.tied is same] for same in (True, False))
    count = len(best.row.values)
    if count < 2:
        return ["With one seed there is no interval, and nothing is told apart."]
    if not tied:
        return [f"The {len(behind)} others are told apart from it over {count} seeds."]
    said = [f"Not told apart from it over {count} seeds: {_named(tied)}."]
    return [*said, f"Told apart, and behind: {_named(behind)}."] if behind else said


def _kept_best(rows: Iterable[Row], key: str, measure: Measure) -> str:
    kept = [
        Row(method=row.method, seeds=row.seeds, values=row.forgetting[key].values)
        for row in rows
        if key in row.forgetting
    ]
    if not kept:
        return f"Forgetting by {words(key)} was not measured here."
    standings = ranked(kept, measure.higher_is_better)
    best = standings[0].row
    told = f"Least forgotten, by {words(key)}: {_named([best])}, {score(best.score, key)}."
    return " ".join([told, *_ties(standings)])


def _against(baseline: Row, rows: Sequence[Row], higher_is_better: bool) -> str:
    leads = {row.method: lead(row, baseline, higher_is_better) for row in rows if row is not baseline}
    clear = [row for row in rows if (found := leads.get(row.method)) is not None and not found.holds_zero]
    better = [row for row in clear if leads[row.method].mean > 0]
    worse = [row for row in clear if row not in better]
    return (
        f"Told apart from {_named([baseline])}: better {_named(better)}, worse {_named(worse)}; "
        f"{len(leads) - len(clear)} of {len(leads)} are not."
    )


def score(found: Interval | None, metric: str, signed: bool = False) -> str:
    """Mean and 95 % t-interval, its ends where it would leave the metric's range; the mean alone for one value."""
    if found is None:
        return ""
    sign = ("+" if found.mean >= 0 else "-") if signed else ""
    mean = sign + number(abs(found.mean) if signed else found.mean, metric)
    ends = found.bounds(metric, signed)
    if found.half_width is None or ends is None:
        return mean
    if found.leaves_range(metric, signed):
        return f"{mean} ({' to '.join(number(end, metric) for end in ends)})"
    return f"{mean} ± {number(found.half_width, metric)}"


def number(value: float, metric: str) -> str:
    """Shares in percent, other figures as they are."""
    is_share = any(word in metric for word in ("accuracy", "f1"))
    return f"{100 * value:.1f}" if is_share else f"{value:.3f}"


def words(key: str) -> str:
    """The name of a measure for people."""
    return key.replace("_", " ")


def _named(rows: Iterable[Row]) -> str:
    return ", ".join(f"`{row.method}`" for row in rows) or "none"
