"""The page's tables of results: of a comparison's rows and units, of runs, merges and diagnoses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotune.comparison.results import FROZEN, FULL, Row
from isotune.intervals import Interval
from isotune.merging.record import MergedAdapter
from isotune.report import words
from isotune.report.data import Comparison, Diagnosed, RunResult, Weights
from isotune.report.forgetting import measures
from isotune.report.tables import Column, Table, TableCell, simple, text


def result_table(comparison: Comparison) -> Table:
    """One line for each row, the best of each budget marked."""
    summary = comparison.summary
    metric, baseline = summary.metric, summary.baseline
    forgotten = measures(comparison)
    best = [group.best.row for group in comparison.summary.groups]
    tied = [standing.row for group in comparison.summary.groups for standing in group.tied]
    columns = [
        Column("method", False),
        Column("options", False),
        Column("parameters"),
        Column(metric.replace("_", " "), hint="mean and 95 % interval on the test rows"),
        Column("against the best", False, "at the same budget, by the paired interval"),
        *([Column(f"minus {baseline}", hint="paired over seeds")] if baseline else []),
        *[Column(measure.label) for measure in forgotten.values()],
        Column("learning rate"),
        Column("s a step"),
        Column("peak memory"),
        Column("size on disk"),
        Column("export rank"),
    ]
    table = Table(f"{summary.task or 'results'}: every method at every budget", columns)
    for row in comparison.summary.rows:
        rate = row.learning_rate
        edge = "at an end of the range searched" if row.edge else ""
        table.rows.append(
            [
                text(words.method_name(row.method), "best" if row in best else ""),
                text(words.options(row.options)),
                TableCell(words.number(row.parameters), row.parameters),
                _scored(metric, row),
                text(_standing(row, best, tied)),
                *([_difference(metric, row, baseline)] if baseline else []),
                *[_kept(key, row.forgetting.get(key)) for key in forgotten],
                TableCell(
                    "–" if rate is None else f"{rate:.3g}{' ◂▸' if edge else ''}", rate, "edge" if edge else "", edge
                ),
                TableCell(words.number(row.seconds_per_step), row.seconds_per_step),
                TableCell(words.memory(row.peak_memory_bytes), row.peak_memory_bytes),
                TableCell(words.memory(row.adapter_bytes), row.adapter_bytes),
                TableCell(words.number(row.export_rank), row.export_rank),
            ]
        )
    return table


def _standing(row: Row, best: Sequence[Row], tied: Sequence[Row]) -> str:
    if row.method in (FULL, FROZEN) or not row.values:
        return "–"
    return "best mean" if row in best else "not told apart" if row in tied else "behind"


def _scored(metric: str, row: Row) -> TableCell:
    if not row.values:
        return TableCell("no result", None, "failed")
    found = row.score
    return TableCell(words.score(metric, found.mean, found.half_width), found.mean)


def _difference(metric: str, row: Row, baseline: str) -> TableCell:
    found = row.difference
    if found is None:
        return TableCell("baseline" if row.method == baseline else "–")
    mark = "" if found.holds_zero else "clear"
    title = "the interval holds zero" if found.holds_zero else "the interval excludes zero"
    return TableCell(words.score(metric, found.mean, found.half_width, signed=True), found.mean, mark, title)


def _kept(key: str, found: Interval | None) -> TableCell:
    return TableCell("–") if found is None else TableCell(words.score(key, found.mean, found.half_width), found.mean)


def unit_table(comparison: Comparison) -> Table:
    """Every unit of work, with its error where it failed."""
    metric = comparison.summary.metric
    lines = []
    for unit in comparison.units:
        scores = [unit.metrics.get(f"{split}_{metric}") for split in ("validation", "test")]
        failed = f"failed: {unit.error or 'no message'}"
        lines.append(
            [
                text(unit.unit),
                text(unit.kind),
                text(words.method_name(unit.method)),
                TableCell(words.number(unit.budget), unit.budget),
                _plain(unit.learning_rate, "{:.3g}"),
                _plain(unit.seed, "{}"),
                *[TableCell(words.score(metric, value), value) for value in scores],
                TableCell(words.number(unit.seconds), unit.seconds),
                text("done") if unit.done else text(failed, "failed long"),
            ]
        )
    name = metric.replace("_", " ")
    titles = [
        "unit",
        "kind",
        "method",
        "budget",
        "learning rate",
        "seed",
        f"validation {name}",
        f"test {name}",
        "seconds",
    ]
    return simple(f"All {len(lines):,} units", [*titles, "status"], lines)


def run_table(runs: Sequence[RunResult]) -> Table:
    """One line for each run."""
    scores = list(dict.fromkeys(key for run in runs for key in run.metrics if _is_score(key)))
    titles = ["run", "method", "parameters", *(s.replace("_", " ") for s in scores), "learning rate", "steps"]
    lines = []
    for run in runs:
        m = run.metrics
        count = m.get("trainable_parameters_encoder", m.get("trainable_parameters"))
        lines.append(
            [
                text(run.name),
                text(words.method_name(str(m.get("method", "–")))),
                TableCell(words.number(count), count),
                *[TableCell(words.score(key, m.get(key)), m.get(key)) for key in scores],
                _plain(m.get("learning_rate"), "{:.3g}"),
                _plain(m.get("steps"), "{:,}"),
                _plain(m.get("seconds_per_step"), "{:.3g}"),
                TableCell(words.memory(m.get("peak_memory_bytes")), m.get("peak_memory_bytes")),
                _plain(m.get("seed"), "{}"),
            ]
        )
    return simple("Runs", [*titles, "s a step", "peak memory", "seed"], lines)


_MEASURES = (
    "accuracy", "f1", "matthews", "pearson", "spearman", "rmse", "exact_match", "exact_match_number", "perplexity",
    "loss",
)  # fmt: skip


def _is_score(key: str) -> bool:
    return key.startswith(("test_", "validation_")) and key.endswith(_MEASURES)


def _plain(value: Any, form: str) -> TableCell:
    return TableCell("–") if value is None else TableCell(form.format(value), value)


def merge_table(merged: Sequence[Weights]) -> Table:
    """One line for each model that went into a merge."""
    lines = []
    for one in merged:
        if one.merge is None:
            continue
        error = one.merge.error if isinstance(one.merge, MergedAdapter) else None
        lines += [
            [
                text(one.name),
                text(one.merge.rule),
                text(name),
                _plain(weight, "{:g}"),
                TableCell(words.share(error), error),
            ]
            for name, weight in one.merge.models.items()
        ]
    return simple("What was merged", ["result", "rule", "model", "weight", "cut off by the rank"], lines)


def diagnosis_table(diagnoses: Sequence[Diagnosed]) -> Table:
    """One line for each diagnosed model: the totals, side by side."""
    lines = []
    for one in diagnoses:
        total, sites = one.found.get("total") or {}, one.found["sites"]
        ranks = [site["effective_rank"] for site in sites if site.get("effective_rank")]
        errors = [site["orthogonality_error"] for site in sites if site.get("orthogonality_error") is not None]
        middle = sorted(ranks)[len(ranks) // 2] if ranks else None
        count, where = total.get("intruders"), total.get("sites_with_intruders")
        lines.append(
            [
                text(one.label),
                text(words.method_name(one.method)),
                TableCell(words.number(total.get("sites", len(sites))), total.get("sites", len(sites))),
                TableCell(words.number(total.get("trainable")), total.get("trainable")),
                TableCell(words.share(total.get("relative_change")), total.get("relative_change")),
                TableCell(words.number(middle), middle),
                TableCell(words.number(count), count),
                TableCell(words.number(where), where),
                TableCell(words.number(max(errors), 2) if errors else "–", max(errors, default=None)),
            ]
        )
    titles = ["model", "method", "layers", "trainable", "relative change", "effective rank, median", "intruders"]
    return simple(
        "Models side by side", [*titles, "layers with intruders", "distance from orthogonality, worst"], lines
    )
