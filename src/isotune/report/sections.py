"""What the page shows, in order: sections of figures, tables and texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from isotune.report.data import Collected, Comparison, Json
from isotune.report.figures.angles import angle_histograms
from isotune.report.figures.curves import curve_figures, run_curves
from isotune.report.figures.figure import Figure, styles
from isotune.report.figures.forgetting import along_figures, forgetting_figures
from isotune.report.figures.heatmap import heat_maps
from isotune.report.figures.labels import label_figures, label_tables
from isotune.report.figures.merging import merge_figures
from isotune.report.figures.pareto import pareto_figures
from isotune.report.figures.range_tests import range_test_figures
from isotune.report.figures.rates import rate_figures
from isotune.report.figures.scores import score_figures
from isotune.report.figures.spectra import MOST_SITES, shown_sites, spectra
from isotune.report.reproduce import TextBlock, reproduce_comparison, reproduce_run, reproduce_weights
from isotune.report.results import diagnosis_table, merge_table, result_table, run_table, unit_table
from isotune.report.tables import Table

_SIDES: dict[str | None, str] = {"left": "left", "right": "right", "both": "left or right"}


@dataclass
class PageSection:
    """A heading, how to read what is beneath it, and that."""

    key: str
    title: str
    brief: str
    """The title in the navigation."""
    about: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    """Tables that are shown on demand."""
    blocks: list[TextBlock] = field(default_factory=list)
    side_by_side: bool = False
    """Whether the figures show the same of several models."""


def sections(collected: Collected) -> list[PageSection]:
    """All sections that have something to show."""
    found: list[PageSection] = []
    several = len(collected.comparisons) > 1
    for number, comparison in enumerate(collected.comparisons):
        for section in _comparison(comparison):
            if several:
                section.title = f"{section.title}: {comparison.name}"
                section.brief = f"{section.brief}, {comparison.name}"
            section.key = f"{section.key}-{number}" if several else section.key
            found.append(section)
    found += [*_runs(collected), *_weights(collected), *_diagnoses(collected)]
    return [s for s in found if s.tables or s.figures or s.folded or s.blocks] + [_reproduce(collected)]


def _comparison(comparison: Comparison) -> Iterator[PageSection]:
    style = styles([row.method for row in comparison.summary.rows])
    confidence = comparison.summary.confidence
    yield PageSection(
        "results",
        "Results",
        "Results",
        f"Dots are means, bars their {confidence}, ticks single seeds; overlapping bars do not decide, "
        "because the verdict uses differences paired by seed. In the table a difference in bold excludes zero, and "
        "◂▸ marks a learning rate at an end of the range that was searched.",
        [result_table(comparison)],
        score_figures(comparison, style),
    )
    better = "Up" if comparison.summary.higher_is_better else "Down"
    yield PageSection(
        "cost",
        "Score and cost",
        "Cost",
        f"{better} and left is better; the dotted steps join what nothing cheaper beats (the Pareto front). "
        "Points of equal cost stand a little apart.",
        figures=pareto_figures(comparison, style),
    )
    yield PageSection(
        "forgetting",
        "Forgetting against gain",
        "Forgetting",
        "How much was learned of the task, across, and how much was kept of the base model, upwards.",
        figures=forgetting_figures(comparison, style),
    )
    yield PageSection(
        "forgetting-along",
        "Forgetting at equal scores",
        "At equal scores",
        "One run can look forgetful only because it learned more. Lines go from the start of the runs to their end, "
        "means over seeds; the dotted one is a score on the validation rows that all methods reach, and the table "
        "says what each had forgotten by then.",
        figures=along_figures(comparison, style),
    )
    yield PageSection(
        "rates",
        "Learning rates searched",
        "Learning rates",
        "Validation scores of the trials; the large mark is the rate that the seeds ran with. A large mark at the "
        "end of its line says that the search may have stopped too early.",
        figures=rate_figures(comparison, style),
    )
    yield PageSection(
        "curves",
        "Learning curves",
        "Curves",
        "The mean over seeds at the chosen learning rate; the band reaches from the lowest to the highest seed.",
        figures=curve_figures(comparison, style),
        folded=[unit_table(comparison)] if comparison.units else [],
    )


def _runs(collected: Collected) -> Iterator[PageSection]:
    if collected.runs:
        yield PageSection("runs", "Runs", "Runs", "", [run_table(collected.runs)])
        yield PageSection(
            "labels",
            "What the runs do with each label",
            "Labels",
            "Support is how often a label is the true one. In a map each line is a true label, and shares are of its "
            "rows; what is off the diagonal is wrong.",
            label_tables(collected.runs),
            label_figures(collected.runs),
        )
        yield PageSection(
            "run-curves", "Learning curves of the runs", "Curves", "", figures=run_curves(collected.runs)
        )
        yield PageSection(
            "range-tests",
            "How learning rates were found",
            "Range tests",
            "How much lower the loss of a batch was before the step at each rate than in the untrained model, as a "
            "running mean. The dotted line is the rate taken: half of the first with four fifths of the largest "
            "gain.",
            figures=range_test_figures(collected.runs),
        )


def _weights(collected: Collected) -> Iterator[PageSection]:
    merged = [one for one in collected.weights if one.merge]
    if merged:
        yield PageSection(
            "merging",
            "Merging",
            "Merging",
            "What was merged with which weight. Cut off: |written − merged| / |merged| in the Frobenius norm, for a "
            "merge that was written at a smaller rank than it has.",
            [merge_table(merged)],
            merge_figures(merged),
        )


def _diagnoses(collected: Collected) -> Iterator[PageSection]:
    found = collected.diagnoses
    if not found:
        return
    settings: Json = next((d.found["settings"] for d in found if d.found.get("settings")), {})
    yield PageSection(
        "changes",
        "What the adaptation did to the weights",
        "Weights",
        "Relative change: |W′ − W| / |W| of a layer. Effective rank: how many directions the change is spread over. "
        "Colours mean the same in all maps.",
        [diagnosis_table(found)],
        heat_maps(found),
        side_by_side=True,
    )
    drawn = spectra(found)
    layers = {site["site"] for d in found for site in d.found["sites"] if site.get("adapted_values")}
    limited = (
        f" Shown are {MOST_SITES} of {len(layers)} layers: those with intruders and those that changed the most."
    )
    yield PageSection(
        "spectra",
        "Spectra and intruder dimensions",
        "Spectra",
        f"The largest singular values before and after, and those of the change. An intruder, ringed, is one of "
        f"the first {settings.get('k', 'k')} singular vectors of W′, {_SIDES.get(settings.get('side'), 'left')}, "
        f"whose cosine with every one of W is below {settings.get('threshold', 'the threshold')}."
        + (limited if len(layers) > len(shown_sites(found)) else ""),
        figures=drawn,
        side_by_side=True,
    )
    yield PageSection(
        "angles",
        "Rotation angles",
        "Angles",
        "By how much the rotations of orthogonal methods turn, in all layers; what stays in place is not counted.",
        figures=angle_histograms(found),
        side_by_side=True,
    )


def _reproduce(collected: Collected) -> PageSection:
    blocks: list[TextBlock] = []
    for comparison in collected.comparisons:
        blocks += reproduce_comparison(comparison)
    for run in collected.runs:
        blocks += reproduce_run(run)
    for one in collected.weights:
        blocks += reproduce_weights(one)
    return PageSection("reproduce", "Settings and versions", "Versions", blocks=blocks)
