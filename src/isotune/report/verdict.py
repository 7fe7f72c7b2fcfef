"""The verdict: sentences from a comparison's numbers. Pure functions; every claim rests on a paired interval.

A difference counts only where its 95 % interval over seeds excludes zero; otherwise the two "cannot be told apart".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from isotune.report import words
from isotune.report.data import Collected, Comparison, Json
from isotune.report.forgetting import forgetting_findings
from isotune.report.intervals import Estimate
from isotune.report.others import adapter_findings, diagnosis_findings, run_verdict
from isotune.report.standings import FROZEN, FULL, Group, Standing, groups, lead, reference, score


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
    found = groups(comparison)
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
    seeds = max(len(row["values"]) for row in comparison.rows)
    budgets = [group.budget for group in found if group.budget is not None]
    at = f" at {words.listed([f'{b:,}' for b in budgets])} trainable parameters" if budgets else ""
    references = [words.method_name(m) for m in (FULL, FROZEN) if reference(comparison, m)]
    beside = f", with {words.listed(references)} beside them" if references else ""
    searched = summary.get("trials")
    search = f"; learning rates searched with {words.counted(searched, 'trial')} each" if searched else ""
    model = f" on {summary['model']}" if summary.get("model") else ""
    task = f" ({summary['task']})" if summary.get("task") else ""
    return (
        f"{words.counted(len(methods), 'method')}{model}{task}{at}{beside}; "
        f"{words.counted(seeds, 'seed')} each, test {summary['metric'].replace('_', ' ')}{search}."
    )


def _headline(comparison: Comparison, group: Group) -> str:
    metric, best = comparison.summary["metric"], group.best
    value = _value(metric, best.score)
    others, tied = group.standings[1:], [standing.method for standing in group.tied]
    beaten = [standing.method for standing in others if not standing.tied]
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
    metric = comparison.summary["metric"]
    rows = [row for row in comparison.rows if row["values"]]
    shown = [f"{words.method_name(row['method'])} {_value(metric, score(row))}" for row in rows]
    return words.sentence(f"{words.listed(shown)}; no adapter has results yet.")


def _cheapest(comparison: Comparison, found: list[Group]) -> list[str]:
    """The fewest parameters that cannot be told apart from the best of all budgets."""
    if len(found) < 2:
        return []
    higher = comparison.summary.get("higher_is_better", True)
    everyone = [standing for group in found for standing in group.standings]
    top = max(everyone, key=lambda s: s.score.mean if higher else -s.score.mean)
    tied = [s for s in everyone if s is top or _tied(lead(comparison, top.row, s.row))]
    least = min(tied, key=lambda s: (s.row.get("parameters") or 0, -s.score.mean if higher else s.score.mean))
    metric = comparison.summary["metric"]
    if least is top:
        return [f"The best score overall is {_named(top.row)}, {_value(metric, top.score)}."]
    return [
        f"The best score overall is {_named(top.row)}, {_value(metric, top.score)}; the cheapest that cannot be told "
        f"apart from it is {_named(least.row)}, {_value(metric, least.score)}."
    ]


def _against_references(comparison: Comparison, found: list[Group]) -> list[str]:
    if not found:
        return []
    metric, said = comparison.summary["metric"], []
    higher = comparison.summary.get("higher_is_better", True)
    top = max((group.best for group in found), key=lambda s: s.score.mean if higher else -s.score.mean)
    full, frozen = reference(comparison, FULL), reference(comparison, FROZEN)
    if full is not None:
        margin = lead(comparison, full, top.row)
        many = (full.get("parameters") or 0) / max(1, top.row.get("parameters") or 1)
        size = f" with {words.number(many, 2)} times the parameters" if many > 1 else ""
        value = _value(metric, score(full))
        if margin is None or margin.half_width is None:
            said.append(f"Full fine-tuning reaches {value}{size}; one seed cannot say whether that differs.")
        elif margin.holds_zero:
            said.append(f"Full fine-tuning, {value}{size}, cannot be told apart from {_named(top.row)}.")
        else:
            word = "better" if margin.mean > 0 else "worse"
            size_of_it = words.score(metric, abs(margin.mean), margin.half_width, signed=True).lstrip("+")
            said.append(f"Full fine-tuning, {value}{size}, is {word} than {_named(top.row)} by {size_of_it}.")
    if frozen is not None:
        weak = [s for g in found for s in g.standings if _not_better(lead(comparison, s.row, frozen))]
        value = _value(metric, score(frozen))
        said.append(
            f"Without any adaptation the frozen base reaches {value}"
            + (
                f"; {words.listed([_named(s.row) for s in weak])} cannot be shown to improve on it."
                if weak
                else ", and every method clearly improves on it."
            )
        )
    return said


def _speed(found: list[Group]) -> list[str]:
    """The fastest and the slowest step."""
    timed = [s for group in found for s in group.standings if s.row.get("seconds_per_step")]
    if len({s.method for s in timed}) < 2:
        return []
    fastest, slowest = (f(timed, key=lambda s: s.row["seconds_per_step"]) for f in (min, max))
    ratio = slowest.row["seconds_per_step"] / fastest.row["seconds_per_step"]
    return [
        f"A training step takes {words.number(fastest.row['seconds_per_step'])} s with {_named(fastest.row)}, the "
        f"fastest, and {words.number(ratio, 2)} times as long with {_named(slowest.row)}, the slowest."
    ]


def _cautions(comparison: Comparison, found: list[Group]) -> list[str]:
    summary, said = comparison.summary, []
    units = summary.get("units") or {}
    planned, done, failed = (units.get(key, 0) for key in ("planned", "done", "failed"))
    if done + failed < planned:
        said.append(
            f"The comparison is not finished: {done:,} of {planned:,} units are done, so all of this may change."
        )
    if failed:
        said.append(f"{words.counted(failed, 'unit')} failed; see the list of units.")
    empty = [_named(row) for row in comparison.rows if not row["values"]]
    empty += [str(cell) for cell in summary.get("without_result") or ()]
    if empty:
        said.append(f"No results for {words.listed(empty)}.")
    edges = [_named(row) for row in comparison.rows if row.get("edge")]
    if edges:
        said.append(
            f"The best learning rate of {words.listed(edges)} lies at an end of the range that was searched; beyond "
            f"it {'it' if len(edges) == 1 else 'they'} may do better."
        )
    seeds = max(len(row["values"]) for row in comparison.rows)
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
            "parameters": standing.row.get("parameters"),
            "mean": standing.score.mean,
            "half_width": standing.score.half_width,
            "behind": None if behind is None else {"mean": behind.mean, "half_width": behind.half_width},
        }

    beaten = [s for s in group.standings[1:] if not s.tied]
    return {
        "comparison": comparison.name,
        "metric": comparison.summary["metric"],
        "budget": group.budget,
        "best": plain(group.best),
        "tied": [plain(s) for s in group.tied],
        "beaten": [plain(s) for s in beaten],
    }


def _tied(margin: Estimate | None) -> bool:
    return margin is None or margin.holds_zero


def _not_better(margin: Estimate | None) -> bool:
    return margin is not None and margin.half_width is not None and (margin.holds_zero or margin.mean < 0)


def _value(metric: str, found: Estimate) -> str:
    return words.score(metric, found.mean, found.half_width)


def _named(row: Json, several: bool = True) -> str:
    return words.method_name(row["method"]) + (f" at {row['budget']:,}" if several and row.get("budget") else "")
