"""Merging as a job: from a recipe to a merged model, and the score of merged adapters on the runs' own rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from isotune.checkpoint.files import CONFIG
from isotune.checkpoint.load import load
from isotune.checkpoint.stored import State, read_stored
from isotune.errors import IsotuneError, OptionError
from isotune.merging.merge import Merged, merge, short_names
from isotune.merging.recipe import MergeRecipe
from isotune.merging.search import search_weights
from isotune.model.attach import remove
from isotune.training.data import load_splits
from isotune.training.evaluation import measured
from isotune.training.export import adapter_folder
from isotune.training.folder import RunFolder
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks import Example, classification_examples

_TRIAL = "isotune-merged"


def merge_recipe(
    recipe: MergeRecipe, force: bool = False, resume: bool = False, search: int | None = None, progress: bool = True
) -> Merged:
    """Merge what the recipe names, and write it to its output folder.

    Args:
        recipe: From `build_merge_recipe`.
        force: Merge adapters that name different bases.
        resume: Full models: go on where a merge was stopped.
        search: Search the weights in so many trials on the runs' validation rows, beginning with the recipe's.
        progress: Whether to show anything on standard error.

    Raises:
        IsotuneError: Inputs or options that cannot be used; nothing is written then.
    """
    assert recipe.output is not None
    quiet_libraries()
    screen = Screen(progress)
    folders = [adapter_folder(path) for path in recipe.paths]
    weights = recipe.weights
    common: dict[str, Any] = {
        "rule": recipe.built_rule(), "names": recipe.names, "rank": recipe.rank, "base": recipe.base,
        "seed": recipe.seed, "force": force,
    }  # fmt: skip
    if search is not None:
        tasks = Tasks(recipe.paths, "validation", names=recipe.names)

        def score(weights: list[float]) -> float:
            with tempfile.TemporaryDirectory(prefix="isotune-") as scratch:
                where = Path(scratch) / "merged"
                merge(folders, weights=weights, output=where, modules="drop", progress=False, **common)
                value = tasks.score(where)
            screen.say(f"weights {', '.join(f'{w:.2f}' for w in weights)}: {value:.4f}")
            return value

        screen.say(f"searching {len(weights)} weights, {search} trials on {tasks.rows} validation rows")
        weights = search_weights(score, weights, search, recipe.seed).weights
    return merge(folders, weights=weights, output=recipe.output, modules=recipe.modules, progress=progress, **common)


@dataclass(frozen=True)
class Task:
    """What one run was trained for: its rows, and the modules trained in full that belong to it."""

    name: str
    session: Session
    """Shared by all tasks of one base model."""
    examples: list[Example]
    trained: State


class Tasks:
    """The validation or test rows of several runs, on which any adapter of their base can be measured.

    Each task keeps its own head; the backbone is one for all tasks on the same base.
    """

    def __init__(
        self,
        runs: Sequence[str | Path],
        split: Literal["validation", "test"] = "validation",
        names: Sequence[str] | None = None,
    ) -> None:
        """Raises IsotuneError for a folder that is no finished run, or has no such rows."""
        sessions: dict[tuple[Any, ...], Session] = {}
        self.tasks = [
            _task(run, name, split, sessions) for run, name in zip(runs, names or short_names(runs), strict=True)
        ]

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return sum(len(task.examples) for task in self.tasks)

    def metrics(self, adapter: str | Path | None) -> dict[str, dict[str, Any]]:
        """By task the metrics of the base with that adapter (None: without any) and the task's own modules."""
        found = {}
        for session in {id(task.session): task.session for task in self.tasks}.values():
            if adapter is not None:
                load(session.model, adapter, name=_TRIAL)
            try:
                for task in self.tasks:
                    if task.session is session:
                        _put(session.model, task.trained)
                        found[task.name], _ = measured(session, task.examples)
            finally:
                if adapter is not None:
                    remove(session.model, _TRIAL)
        return {task.name: found[task.name] for task in self.tasks}

    def score(self, adapter: str | Path | None) -> float:
        """The mean over the tasks: of the accuracy, or of minus the loss for language models."""
        found = self.metrics(adapter).values()
        return sum(metrics.get("accuracy", -metrics["loss"]) for metrics in found) / len(found)


def _task(run: str | Path, name: str, split: str, sessions: dict[tuple[Any, ...], Session]) -> Task:
    folder = RunFolder(run)
    if not folder.is_run():
        raise IsotuneError(f"{run} is no run's folder, whose {split} rows could be used; give runs of isotune train")
    recipe, adapter = folder.recipe(), adapter_folder(run)
    rows = getattr(load_splits(recipe.data, recipe.task, recipe.seed), split)
    if not rows:
        raise IsotuneError(f"the run in {run} has no {split} rows")
    spec = TaskSpec.read(adapter)
    key = (spec.task, spec.model, spec.pooling, spec.max_length, spec.dtype, spec.separator)
    session = sessions.setdefault(key, Session(spec)) if key not in sessions else sessions[key]
    if spec.task == "classification":
        examples = classification_examples(rows, session.tokenizer, spec.labels, session.max_length)
    else:
        examples = session.examples(rows)
    return Task(name, session, examples, read_stored(adapter).trained)


def _put(model: nn.Module, trained: State) -> None:
    """Give the model these modules' values; a classifier's head may change its number of labels."""
    for path, tensors in trained.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) and module.weight.shape != tensors["weight"].shape:
            labels, hidden = tensors["weight"].shape
            module = nn.Linear(hidden, labels, dtype=module.weight.dtype, device=module.weight.device)
            model.set_submodule(path, module)
        module.load_state_dict(tensors)
