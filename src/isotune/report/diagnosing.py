"""Which adapters and models to diagnose for a report, and how they are called in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from isotune.comparison.results import FROZEN, FULL, Row
from isotune.errors import IsotuneError
from isotune.folders import ADAPTER, MODEL
from isotune.report import words
from isotune.report.data import Collected, Comparison, Diagnosed, Json

Diagnose = Callable[[Path, "str | Path | None"], Json]
Candidate = tuple[str, str, Path, "str | None"]
"""Label, method, folder, and the base where the folder does not say it."""


def add_diagnoses(
    collected: Collected,
    base: str | Path | None = None,
    most: int = 12,
    diagnose: Diagnose | None = None,
    progress: bool = True,
) -> None:
    """Diagnose what `collected` names, the first seed of each row of a comparison, at most `most` models.

    What cannot be diagnosed is said in `collected.notes`; it never stops a report. `diagnose` takes a folder and its
    base; by default all are diagnosed together.
    """
    found = list(_candidates(collected))
    if not found or most < 1:
        return
    if len(found) > most:
        left = len(found) - most
        collected.notes.append(
            f"{words.counted(left, 'model was', 'models were')} not diagnosed, beyond the limit of {most} "
            "(--diagnose-most)."
        )
    run = diagnose or _together(found[:most], base, progress)
    for label, method, path, named in found[:most]:
        try:
            data = run(path, base if base is not None else named)
            collected.diagnoses.append(Diagnosed(label, method or data.get("method") or "unknown", data))
        except IsotuneError as error:
            collected.notes.append(f"{label} was not diagnosed: {error}.")


def note_undiagnosed(collected: Collected) -> None:
    """Say on the page that the weights were not looked at, and which command does."""
    if any(True for _ in _candidates(collected)):
        folders = " ".join(one.path.name for one in collected.subjects)
        collected.notes.append(
            f"what the adaptation did to the weights was not measured for this page; isotune report {folders} does."
        )


def _candidates(collected: Collected) -> Iterator[Candidate]:
    for comparison in collected.comparisons:
        yield from _of_comparison(comparison, len(collected.comparisons) > 1)
    for run in collected.runs:
        if run.weights is not None:
            yield (
                run.name,
                str(run.metrics.get("method", "")),
                run.weights,
                _named(run.weights, run.recipe.get("model")),
            )
    for one in collected.weights:
        if one.kind != "compressed":
            yield one.name, "", one.path, None


def _of_comparison(comparison: Comparison, several: bool) -> Iterator[Candidate]:
    """The first run of each row that is still there: the full fine-tuning, then the best of each budget first."""
    ranked = [standing.row for group in comparison.summary.groups for standing in group.standings]
    full = [row for row in comparison.summary.rows if row.method == FULL]
    budgets = len({row.budget for row in ranked}) > 1
    for row in [*full, *ranked]:
        folder = _weights(comparison, row)
        if folder is not None and row.method != FROZEN:
            at = f" at {row.budget:,}" if budgets and row.budget else ""
            of = f", {comparison.name}" if several else ""
            yield f"{words.method_name(row.method)}{at}{of}", row.method, folder, None


def _weights(comparison: Comparison, row: Row) -> Path | None:
    for run in row.runs:
        for name in (ADAPTER, MODEL):
            folder = comparison.path / run / name
            if folder.is_dir():
                return folder
    return None


def _named(folder: Path, model: str | None) -> str | None:
    """The base of a full model, which does not say it; adapters do."""
    return model if folder.name == MODEL else None


def _together(chosen: Sequence[Candidate], base: str | Path | None, progress: bool) -> Diagnose:
    """The diagnoses of all that is chosen, made at once, so that each weight of a base is decomposed only once.

    Intruders are looked for on both sides: what rotates the input leaves the left singular vectors where they are.
    """
    from isotune.diagnostics import diagnose, survey

    bases: dict[str | Path | None, list[Path]] = {}
    for _, _, path, named in chosen:
        bases.setdefault(base if base is not None else named, []).append(path)
    done: dict[Path, Json] = {}
    for of, paths in bases.items():
        with suppress(IsotuneError):  # one that cannot be diagnosed; below, the others are, alone
            found = survey(paths, of, side="both", progress=progress).diagnoses
            done |= {path: one.to_dict() for path, one in zip(paths, found, strict=True)}

    def of_one(path: Path, of: str | Path | None) -> Json:
        return done[path] if path in done else diagnose(path, of, side="both", progress=False).to_dict()

    return of_one
