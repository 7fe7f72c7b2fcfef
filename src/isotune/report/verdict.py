"""The verdict: sentences from a comparison's numbers. Pure functions; every claim rests on a paired interval.

A difference counts only where its 95 % interval over seeds excludes zero; otherwise the two "cannot be told apart".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from isotune.comparison.results import FROZEN, FULL, Group, Standing
from isotune.intervals import Interval
from isotune.report import words
from isotune.report.data import Collected, Comparison, Json
from isotune.report.forgetting import forgetting_findings
from isotune.report.others import adapter_findings, diagnosis_findings, run_verdict
from isotune.report.words import row_name


@dataclass(frozen=True)
class Verdict:
    """What the page says first."""

    subject: str
    """What was compared, or shown."""
    headlines: list[str]
    """Which is best at which cost, a sentence for each budget."""
    findings: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    """What the reader must know before believing the headlines."""
    ranking: list[Json] = field(default_factory=list)
    """The same for machines: for each budget the best, the tied and the beaten methods."""

    def as_dict(self) -> dict[str, Any]:
        """As `isotune report --json` prints it."""
        return asdict(self)


def judge(collected: Collected) -> list[Verdict]:
    """One verdict for each comparison, then one for the runs and one for the adapters and models by themselves."""
    found = [compared(comparison) for comparison in collected.comparisons]
    if collected.runs:
        found.append(Verdict(*run_verdict(collected.runs)))
    if collected.weights:
        found.append(Verdict(*adapter_findings(collected.weights)))
    seen = diagnosis_findings(collected.diagnoses)
    if found and seen:
        found[-1].findings.extend(seen)
    return found


def compared(comparison: Comparison) -> Verdict:
    """The verdict on a comparison."""
    found = comparison.summary.groups
    return Verdict(
        _subject(comparison, found),
        [_headline(comparison, group) for group in found] or [_only_references(comparison)],
        [
            *_cheapest(comparison, found),
            *_against_references(comparison, found),
            *_speed(found),
            *forgetting_findings(comparison),
        ],
        _cautions(comparison, found),
        [_for_machines(comparison, group) for group in found],
    )


def _subject(comparison: Comparison, found: list[Group]) -> str:
    summary = comparison.summary
    methods = list(dict.fromkeys(standing.method for group in found for standing in group.standings))
    seeds = max(len(row.values) for row in comparison.summary.rows)
    budgets = [group.budget for group in found if group.budget is not None]
    at = f" at {words.listed([f'{b:,}' for b in budgets])} trainable parameters" if budgets else ""
    references = [words.method_name(m) for m in (FULL, FROZEN) if comparison.summary.reference(m)]
    beside = f", with {words.listed(references)} beside them" if references else ""
    search = f"; learning rates searched with {words.counted(summary.trials, 'trial')} each" if summary.trials else ""
    model = f" on {summary.model}" if summary.model else ""
    task = f" ({summary.task})" if summary.task else ""
    return (
        f"{words.counted(len(methods), 'method')}{model}{task}{at}{beside}; "
        f"{words.counted(seeds, 'seed')} each, test {summary.metric.replace('_', ' ')}{search}."
    )


def _headline(comparison: Comparison, group: Group) -> str:
    metric, best = comparison.summary.metric, group.best
    value = _value(metric, best.score)
    others = group.standings[1:]
    tied, beaten = ([standing.method for standing in some] for some in (group.tied, group.beaten))
    if not others:
        said = f"{best.method} reaches {value}"
    elif all(standing.behind is None or standing.behind.half_width is None for standing in others):
        said = f"{best.method} scores best, {value}, but with one seed each nobody can say whether that is luck"
    elif not tied:
        said = f"{best.method} is best, {value}, and ahead of every other method by more than the seeds vary"
    elif beaten:
        clear = "all others are" if len(beaten) > 1 else f"{beaten[0]} is"
        said = f"{best.method} has the best mean, {value}, but cannot be told apart from {words.listed(tied)}; "
        said += f"{clear} clearly behind"
    else:
        said = (
            f"{words.listed([best.method, *tied])} cannot be told apart: {best.method} has the best mean, {value}, "
        )
        said += "but the paired interval of its lead over " + ("each of them " if len(tied) > 1 else f"{tied[0]} ")
        said += "holds zero"
    return f"{_at(group.budget)}{said}."


def _at(budget: int | None) -> str:
    return "" if budget is None else f"At {budget:,} parameters "


def _only_references(comparison: Comparison) -> str:
    metric = comparison.summary.metric
    rows = [row for row in comparison.summary.rows if row.values]
    shown = [f"{words.method_name(row.method)} {_value(metric, row.score)}" for row in rows]
    return words.sentence(f"{words.listed(shown)}; no adapter has results yet.")


def _cheapest(comparison: Comparison, found: list[Group]) -> list[str]:
    """The fewest parameters that cannot be told apart from the best of all budgets."""
    if len(found) < 2:
        return []
    higher = comparison.summary.higher_is_better
    everyone = [standing for group in found for standing in group.standings]
    top = max(everyone, key=lambda s: s.score.mean if higher else -s.score.mean)
    tied = [s for s in everyone if s is top or _tied(comparison.summary.lead(top.row, s.row))]
    least = min(tied, key=lambda s: (s.row.parameters or 0, -s.score.mean if higher else s.score.mean))
    metric = comparison.summary.metric
    if least is top:
        return [f"The best score overall is {row_name(top.row)}, {_value(metric, top.score)}."]
    return [
        f"The best score overall is {row_name(top.row)}, {_value(metric, top.score)}; the cheapest that cannot be "
        f"told apart from it is {row_name(least.row)}, {_value(metric, least.score)}."
    ]


def _against_references(comparison: Comparison, found: list[Group]) -> list[str]:
    if not found:
        return []
    metric, said = comparison.summary.metric, []
    higher = comparison.summary.higher_is_better
    top = max((group.best for group in found), key=lambda s: s.score.mean if higher else -s.score.mean)
    full, frozen = comparison.summary.reference(FULL), comparison.summary.reference(FROZEN)
    if full is not None:
        margin = comparison.summary.lead(full, top.row)
        many = (full.parameters or 0) / max(1, top.row.parameters or 1)
        size = f" with {words.number(many, 2)} times the parameters" if many > 1 else ""
        value = _value(metric, full.score)
        if margin is None or margin.half_width is None:
            said.append(f"Full fine-tuning reaches {value}{size}; one seed cannot say whether that differs.")
        elif margin.holds_zero:
            said.append(f"Full fine-tuning, {value}{size}, cannot be told apart from {row_name(top.row)}.")
        else:
            word = "better" if margin.mean > 0 else "worse"
            size_of_it = words.score(metric, abs(margin.mean), margin.half_width, signed=True).lstrip("+")
            said.append(f"Full fine-tuning, {value}{size}, is {word} than {row_name(top.row)} by {size_of_it}.")
    if frozen is not None:
        weak = [s for g in found for s in g.standings if _not_better(comparison.summary.lead(s.row, frozen))]
        value = _value(metric, frozen.score)
        said.append(
            f"Without any adaptation the frozen base reaches {value}"
            + (
                f"; {words.listed([row_name(s.row) for s in weak])} cannot be shown to improve on it."
                if weak
                else ", and every method clearly improves on it."
            )
        )
    return said


def _speed(found: list[Group]) -> list[str]:
    """The fastest and the slowest step."""
    timed = [(s.row.seconds_per_step, s.row) for group in found for s in group.standings if s.row.seconds_per_step]
    if len({row.method for _, row in timed}) < 2:
        return []
    (least, fastest), (most, slowest) = (f(timed, key=lambda one: one[0]) for f in (min, max))
    return [
        f"A training step takes {words.number(least)} s with {row_name(fastest)}, the fastest, and "
        f"{words.number(most / least, 2)} times as long with {row_name(slowest)}, the slowest."
    ]


def _cautions(comparison: Comparison, found: list[Group]) -> list[str]:
    summary, said = comparison.summary, []
    units = summary.units
    if units.done + units.failed < units.planned:
        said.append(
            f"The comparison is not finished: {units.done:,} of {units.planned:,} units are done, so all of this may "
            "change."
        )
    if units.failed:
        said.append(f"{words.counted(units.failed, 'unit')} failed; see the list of units.")
    empty = [row_name(row) for row in comparison.summary.rows if not row.values]
    empty += summary.without_result
    if empty:
        said.append(f"No results for {words.listed(empty)}.")
    edges = [row_name(row) for row in comparison.summary.rows if row.edge]
    if edges:
        said.append(
            f"The best learning rate of {words.listed(edges)} lies at an end of the range that was searched; beyond "
            f"it {'it' if len(edges) == 1 else 'they'} may do better."
        )
    seeds = max(len(row.values) for row in comparison.summary.rows)
    if seeds == 1:
        said.append("One seed gives no interval: no difference here is known to be more than luck.")
    elif seeds < 5:
        said.append(f"{seeds} seeds give wide intervals; cannot be told apart does not mean equal.")
    pairs = sum(len(group.standings) - 1 for group in found)
    if pairs > 5 and seeds > 1:
        said.append(f"The {pairs} comparisons with the best are at 95 % each, not corrected for being many.")
    return said


def _for_machines(comparison: Comparison, group: Group) -> Json:
    def plain(standing: Standing) -> Json:
        behind = standing.behind
        return {
            "method": standing.method,
            "parameters": standing.row.parameters,
            "mean": standing.score.mean,
            "half_width": standing.score.half_width,
            "behind": None if behind is None else {"mean": behind.mean, "half_width": behind.half_width},
        }

    return {
        "comparison": comparison.name,
        "metric": comparison.summary.metric,
        "budget": group.budget,
        "best": plain(group.best),
        "tied": [plain(s) for s in group.tied],
        "beaten": [plain(s) for s in group.beaten],
    }


def _tied(margin: Interval | None) -> bool:
    return margin is None or margin.holds_zero


def _not_better(margin: Interval | None) -> bool:
    return margin is not None and margin.half_width is not None and (margin.holds_zero or margin.mean < 0)


def _value(metric: str, found: Interval) -> str:
    return words.score(metric, found.mean, found.half_width)
