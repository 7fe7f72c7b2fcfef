"""What was trained, and what it is for: a run's folder, an adapter's, a model's, or any model by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.checkpoint.files import read_adapter
from isotune.checkpoint.read import holds_adapter
from isotune.errors import IsotuneError
from isotune.folders import TASK
from isotune.training.data import Row, load_rows, load_splits
from isotune.training.folder import RunFolder, trained_folder
from isotune.training.model_folder import open_trained
from isotune.training.recipe import DataSettings, Recipe
from isotune.training.session import Session, TaskSpec


def find_trained(path: Path) -> tuple[Path, Recipe | None]:
    """The folder of an adapter or of a trained model, and the recipe of the run it belongs to, where there is one."""
    if not path.is_dir():
        raise IsotuneError(f"no run or adapter folder at {path}")
    run = RunFolder(path)
    if run.is_run():
        return trained_folder(path), run.recipe()
    around = RunFolder(path.absolute().parent)
    return path, around.recipe() if around.is_run() else None


def found_model(path: str | Path, task: str | None, model: str | None) -> tuple[Path | None, Recipe | None, TaskSpec]:
    """The folder of what was trained (None for a pretrained model), its run's recipe, and what it is for."""
    folder = Path(path)
    if folder.is_dir():
        trained, recipe = find_trained(folder)
        if (trained / TASK).is_file() or task is None:
            return trained, recipe, TaskSpec.read(trained)
        if holds_adapter(trained):
            base = model or read_adapter(trained)[0].get("base_model_name_or_path")
            if not base:
                raise IsotuneError(f"{trained} does not say what it is an adapter of; name the model with --model")
            return trained, recipe, TaskSpec.plain(task, base)
        return None, recipe, TaskSpec.plain(task, str(trained))
    if task is None:
        raise IsotuneError(
            f"no run or adapter folder at {path}; a pretrained model is evaluated with --task, such as causal-lm"
        )
    if model is not None:
        raise IsotuneError(f"no adapter at {path}, which would be one of --model {model}")
    return None, None, TaskSpec.plain(task, str(path))


def open_found(trained: Path | None, spec: TaskSpec, model: str | None, force: bool) -> Session:
    """The model of `found_model`."""
    return Session(spec) if trained is None else open_trained(trained, model, force, spec)


def open_any(path: str | Path, task: str, model: str | None = None, force: bool = False) -> Session:
    """The model that a run trained, or any other: an adapter on its base, a model's folder, a model by its name.

    Raises IsotuneError as `evaluate` does.
    """
    trained, _, spec = found_model(path, task, model)
    return open_found(trained, spec, model, force)


def settings_of(data: str, recipe: Recipe | None, columns: dict[str, Any]) -> DataSettings:
    """How to read `data`: as the run's rows, but for `columns`."""
    known = recipe.data.model_dump() if recipe is not None else {}
    return DataSettings(**{**known, "train": data, **columns})


def rows_for(
    data: str | None,
    spec: TaskSpec,
    recipe: Recipe | None,
    columns: dict[str, Any],
    splits: Sequence[str],
) -> list[Row]:
    """The rows of `data`, or else of the first of the run's splits that has some."""
    if data is None:
        if recipe is None:
            raise IsotuneError("the adapter's run is not at hand: say which rows to take, with --data FILE")
        settings = DataSettings(**{**recipe.data.model_dump(), **columns})
        loaded = load_splits(settings, spec.task, recipe.seed)
        rows = next((found for name in splits if (found := getattr(loaded, name))), None)
        if rows is None:
            raise IsotuneError(f"the run has no {' or '.join(splits)} rows; give some with --data FILE")
        return rows
    return load_rows(data, settings_of(data, recipe, columns), spec.task)
