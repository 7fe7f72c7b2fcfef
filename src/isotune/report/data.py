"""What a report is made of, collected from the folders of comparisons, runs, adapters and models.

Nothing but small text files is read here; what the weights say comes from `diagnosing`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isotune.checkpoint.files import CONFIG
from isotune.comparison.results import Line, Summary
from isotune.comparison.store import Store
from isotune.errors import IsotuneError
from isotune.folders import HISTORY, MODEL, MODEL_CONFIG
from isotune.merging.record import CompressedAdapters, MergeRecord, read_record
from isotune.merging.reversible.stored import INDEX, Reversible
from isotune.training.folder import RunFolder
from isotune.training.range_test import RangeTest, kept_range_test

COMPARISON = ("comparison.yaml", "summary.json", "results.jsonl")

Json = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A sweep: the folder that `isotune compare` wrote."""

    path: Path
    name: str
    summary: Summary
    units: list[Line]
    recipe: str | None


@dataclass(frozen=True)
class RunResult:
    """A finished run of `isotune train`."""

    path: Path
    name: str
    metrics: Json
    history: list[Json]
    recipe: Json
    recipe_text: str
    weights: Path | None
    """The adapter's folder, or the model's after a full fine-tuning."""
    range_test: RangeTest | None = None
    """How its learning rate was found, where the recipe left it open."""


@dataclass(frozen=True)
class Weights:
    """An adapter or a full model by itself, and how it was merged where it was."""

    path: Path
    name: str
    kind: str
    """`adapter`, `checkpoint` or `compressed`."""
    config: Json
    merge: MergeRecord | None


@dataclass(frozen=True)
class Diagnosed:
    """What `isotune.diagnostics.diagnose` found, and what the page calls it."""

    label: str
    method: str
    found: Json


@dataclass
class Collected:
    """Everything that one report shows."""

    comparisons: list[Comparison] = field(default_factory=list)
    runs: list[RunResult] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    diagnoses: list[Diagnosed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def subjects(self) -> list[Comparison | RunResult | Weights]:
        """Everything that was asked about."""
        return [*self.comparisons, *self.runs, *self.weights]


def collect(paths: Sequence[str | Path]) -> Collected:
    """Read the folders, in any mix.

    Raises:
        IsotuneError: A folder that is missing, empty, damaged, unfinished, or holds nothing that isotune wrote.
    """
    if not paths:
        raise IsotuneError("nothing to report on; name the folders of comparisons, runs or adapters")
    found = Collected()
    folders = [Path(path) for path in paths]
    for path, name in zip(folders, _names(folders), strict=True):
        _add(found, path, name)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in paths]


def _add(found: Collected, path: Path, name: str) -> None:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise IsotuneError(f"{path} {what}; a report is made of the folder of a comparison, a run or an adapter")
    if not any(path.iterdir()):
        raise IsotuneError(f"{path} is empty; a report needs a comparison, a run or an adapter that is finished")
    run = RunFolder(path)
    if any((path / file).exists() for file in COMPARISON):
        found.comparisons.append(_comparison(path, name))
    elif run.is_run():
        found.runs.append(_run(run, name))
    elif (path / INDEX).is_file():
        found.weights.append(Weights(path, name, "compressed", {}, read_record(path) or _compressed(path)))
    elif (path / CONFIG).is_file():
        found.weights.append(Weights(path, name, "adapter", read_json(path / CONFIG), read_record(path)))
    elif (path / MODEL_CONFIG).is_file():
        found.weights.append(Weights(path, name, "checkpoint", read_json(path / MODEL_CONFIG), read_record(path)))
    else:
        raise IsotuneError(
            f"{path} holds no comparison (summary.json), no run (recipe.yaml of isotune train), no adapter "
            f"({CONFIG}) and no model (config.json); name a folder that does"
        )


def _comparison(path: Path, name: str) -> Comparison:
    store = Store(path)
    summary = Summary.read(store.summary_file) if store.summary_file.is_file() else so_far(store)
    if not any(row.values for row in summary.rows):
        raise IsotuneError(
            f"{store.summary_file} has no results: no unit of the comparison has finished; let isotune compare go on"
        )
    recipe = store.recipe_file.read_text(encoding="utf-8") if store.recipe_file.is_file() else None
    return Comparison(path, name, summary, list(store.lines().values()), recipe)


def so_far(store: Store) -> Summary:
    """The summary of a comparison that is still running, or was killed; reads its data and its model for the plan.

    Raises IsotuneError where that does not go.
    """
    from isotune.comparison.plan import make_plan
    from isotune.comparison.run import environment
    from isotune.comparison.summary import summarise
    from isotune.training.progress import quiet_libraries

    quiet_libraries()
    try:
        recipe = store.recipe()
        return summarise(make_plan(recipe), recipe, store.lines(), environment())
    except IsotuneError as error:
        raise IsotuneError(
            f"the comparison in {store.path} has no summary.json yet, and none can be made of it: {error}"
        ) from None


def _run(run: RunFolder, name: str) -> RunResult:
    metrics = run.metrics()
    if metrics is None:
        raise IsotuneError(f"the run in {run.path} is not finished: isotune train {run.recipe_file} --resume")
    if not isinstance(metrics, dict):
        raise IsotuneError(f"{run.metrics_file} does not hold metrics; the file is damaged")
    history = run.path / HISTORY
    text = run.recipe_file.read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise IsotuneError(f"{run.recipe_file} cannot be read: {error}") from None
    lines = read_json(history, list) if history.is_file() else _state(run.path)
    weights = [folder for folder in (run.adapter, run.path / MODEL) if folder.is_dir()]
    return RunResult(
        run.path, name, metrics, lines, recipe or {}, text, next(iter(weights), None), kept_range_test(run.path)
    )


def _state(path: Path) -> list[Json]:
    """The log of the newest checkpoint, for runs that wrote no history.json."""
    steps = {int(folder.name[11:]): folder for folder in path.glob("checkpoint-*") if folder.name[11:].isdecimal()}
    file = steps[max(steps)] / "trainer_state.json" if steps else path / "none"
    return read_json(file).get("log_history", []) if file.is_file() else []


def _compressed(path: Path) -> CompressedAdapters:
    """What is known of adapters that an older version compressed, which wrote no record."""
    found = Reversible.load(path)
    errors = {name: max(error.change for error in sites.values()) for name, sites in found.errors.items()}
    return CompressedAdapters(path=path, rule="rmm", models=dict.fromkeys(found.names, 1.0), errors=errors)


def read_json(file: Path, kind: type = dict) -> Any:
    """A JSON file of that kind. Raises IsotuneError for another, or for one that cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IsotuneError(f"{file} cannot be read: {error}; the file is damaged or unfinished") from None
    if not isinstance(value, kind):
        raise IsotuneError(f"{file} holds no JSON {'object' if kind is dict else kind.__name__}; the file is damaged")
    return value
