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
from isotune.errors import IsotuneError
from isotune.folders import HISTORY, MERGE, MODEL, MODEL_CONFIG
from isotune.merging.reversible.compress import INDEX
from isotune.training.folder import RunFolder

COMPARISON = ("comparison.yaml", "summary.json", "results.jsonl")

Json = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A sweep: the folder that `isotune compare` wrote."""

    path: Path
    name: str
    summary: Json
    units: list[Json]
    recipe: str | None

    @property
    def rows(self) -> list[Json]:
        """The summary's rows: one for each method at each budget."""
        return self.summary["rows"]

    def seeds(self, row: Json) -> dict[int, float]:
        """The row's test scores by seed: as the row says, from the units, or else in the summary's order."""
        if len(row.get("seeds") or ()) == len(row["values"]):
            return {int(seed): float(value) for seed, value in zip(row["seeds"], row["values"], strict=True)}
        metric = f"test_{self.summary['metric']}"
        found = {
            int(unit["seed"]): float(unit["metrics"][metric])
            for unit in self.units
            if unit.get("kind") == "seed"
            and unit.get("status") == "done"
            and (unit.get("method"), unit.get("budget")) == (row["method"], row.get("budget"))
            and isinstance(unit.get("metrics", {}).get(metric), int | float)
        }
        if len(found) == len(row["values"]):
            return found
        return dict(enumerate(map(float, row["values"])))


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


@dataclass(frozen=True)
class Weights:
    """An adapter or a full model by itself, and how it was merged where it was."""

    path: Path
    name: str
    kind: str
    """`adapter`, `checkpoint` or `compressed`."""
    config: Json
    merge: Json | None


@dataclass(frozen=True)
class Diagnosis:
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
    diagnoses: list[Diagnosis] = field(default_factory=list)
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
        found.weights.append(Weights(path, name, "compressed", {}, _compressed(path / INDEX)))
    elif (path / CONFIG).is_file():
        found.weights.append(Weights(path, name, "adapter", read_json(path / CONFIG), _merge(path)))
    elif (path / MODEL_CONFIG).is_file():
        found.weights.append(Weights(path, name, "checkpoint", read_json(path / MODEL_CONFIG), _merge(path)))
    else:
        raise IsotuneError(
            f"{path} holds no comparison (summary.json), no run (recipe.yaml of isotune train), no adapter "
            f"({CONFIG}) and no model (config.json); name a folder that does"
        )


def _comparison(path: Path, name: str) -> Comparison:
    file = path / "summary.json"
    summary = read_json(file) if file.is_file() else so_far(path)
    rows = summary.get("rows")
    if not isinstance(rows, list) or not isinstance(summary.get("metric"), str):
        raise IsotuneError(
            f"{file} is no summary of a comparison: `metric` or `rows` is missing; run isotune compare"
        )
    if not any(isinstance(row, dict) and row.get("values") for row in rows):
        raise IsotuneError(
            f"{file} has no results: no unit of the comparison has finished; let isotune compare go on"
        )
    for number, row in enumerate(rows, 1):
        missing = [key for key in ("method", "values") if key not in row]
        if missing:
            raise IsotuneError(f"{file}: row {number} has no {' and no '.join(missing)}; the file is damaged")
    recipe = path / "comparison.yaml"
    units = _lines(path / "results.jsonl")
    return Comparison(path, name, summary, units, recipe.read_text(encoding="utf-8") if recipe.is_file() else None)


def so_far(path: Path) -> Json:
    """The summary of a comparison that is still running, or was killed; reads its data and its model for the plan.

    Raises IsotuneError where that does not go.
    """
    from isotune.comparison.plan import make_plan
    from isotune.comparison.run import environment
    from isotune.comparison.store import Store
    from isotune.comparison.summary import summarise
    from isotune.training.progress import quiet_libraries

    quiet_libraries()
    store = Store(path)
    try:
        recipe = store.recipe()
        return summarise(make_plan(recipe), recipe, store.lines(), environment())
    except IsotuneError as error:
        raise IsotuneError(
            f"the comparison in {path} has no summary.json yet, and none can be made of it: {error}"
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
    return RunResult(run.path, name, metrics, lines, recipe or {}, text, next(iter(weights), None))


def _state(path: Path) -> list[Json]:
    """The log of the newest checkpoint, for runs that wrote no history.json."""
    steps = {int(folder.name[11:]): folder for folder in path.glob("checkpoint-*") if folder.name[11:].isdecimal()}
    file = steps[max(steps)] / "trainer_state.json" if steps else path / "none"
    return read_json(file).get("log_history", []) if file.is_file() else []


def _merge(path: Path) -> Json | None:
    return read_json(path / MERGE) if (path / MERGE).is_file() else None


def _compressed(file: Path) -> Json:
    """What is known of adapters that rule rmm compressed: their names, and the worst error of each one's change."""
    index = read_json(file)
    errors: dict[str, float] = {}
    for site in index.get("sites", {}).values():
        for name, (_, _, error) in site.get("members", {}).items():
            errors[name] = max(errors.get(name, 0.0), error[0])
    return {"rule": "rmm", "models": index.get("names", []), "errors": errors}


def read_json(file: Path, kind: type = dict) -> Any:
    """A JSON file of that kind. Raises IsotuneError for another, or for one that cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IsotuneError(f"{file} cannot be read: {error}; the file is damaged or unfinished") from None
    if not isinstance(value, kind):
        raise IsotuneError(f"{file} holds no JSON {'object' if kind is dict else kind.__name__}; the file is damaged")
    return value


def _lines(file: Path) -> list[Json]:
    """JSON lines, the last of which a crash may have cut short."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise IsotuneError(f"{file}: line {number} is no JSON; the file is damaged") from None
    return [unit for unit in found if isinstance(unit, dict)]
