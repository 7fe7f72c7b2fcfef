"""The score of merged adapters on the rows of the runs that they come from, and the search for weights by it."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from isotune.checkpoint.load import load
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.stored import State
from isotune.errors import IsotuneError, OptionError
from isotune.merging.adapters.merge import merge
from isotune.merging.names import model_names
from isotune.merging.recipe import MergeRecipe
from isotune.model.adapted import bare_copy
from isotune.model.attach import remove
from isotune.model.fold import fold, unfold
from isotune.training.classifiers import is_classifier, logits_layer
from isotune.training.data import load_splits
from isotune.training.evaluation import measured
from isotune.training.folder import RunFolder, adapter_folder
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks.collator import Example
from isotune.training.tasks.contract import signed
from isotune.training.weight_search import search_weights

_TRIAL = "isotune-merged"


def searched(
    recipe: MergeRecipe, folders: Sequence[Path], trials: int, progress: bool, options: Mapping[str, Any]
) -> list[float]:
    """The weights that do best on the validation rows of the recipe's runs; `options` are those of `merge`.

    Weights that the rule refuses count as a trial that scores worst.
    """
    quiet_libraries()
    screen = Screen(progress)
    tasks = Tasks(recipe.paths, "validation", options["names"])

    def score(weights: list[float]) -> float:
        with tempfile.TemporaryDirectory(prefix="isotune-") as scratch:
            where = Path(scratch) / "merged"
            try:
                merge(folders, weights=weights, output=where, modules="drop", progress=False, **options)
            except OptionError as error:
                screen.say(str(error))
                return -math.inf
            value = tasks.score(where)
        screen.say(f"weights {', '.join(f'{w:.2f}' for w in weights)}: {value:.4f}")
        return value

    screen.say(f"searching {len(recipe.weights)} weights, {trials} trials on {tasks.rows} validation rows")
    return search_weights(score, recipe.weights, trials, recipe.seed).weights


@dataclass(frozen=True)
class TaskRows:
    """What one run was trained for: its rows, and the modules trained in full that belong to it."""

    name: str
    session: Session
    """Shared by all tasks of one base model."""
    spec: TaskSpec
    examples: list[Example]
    trained: State


class Tasks:
    """The validation or test rows of several runs, on which any adapter of their base can be measured.

    Each task keeps its own head; the backbone is one for all tasks on the same base, with the adapter folded in.
    """

    def __init__(
        self,
        runs: Sequence[str | Path],
        split: Literal["validation", "test"] = "validation",
        names: Sequence[str] | None = None,
        rows: int | None = None,
    ) -> None:
        """`rows` takes so many of each run's, evenly spaced. Raises IsotuneError for a run without such rows."""
        sessions: dict[str, Session] = {}
        self.tasks = [
            _task(run, name, split, rows, sessions) for run, name in zip(runs, model_names(runs, names), strict=True)
        ]

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return sum(len(task.examples) for task in self.tasks)

    def metrics(self, adapter: str | Path | None) -> dict[str, dict[str, Any]]:
        """By task the metrics of the base with that adapter (None: without any) and the task's own modules."""
        found = {}
        held = {} if adapter is None else read_stored(adapter).trained
        for session in {id(task.session): task.session for task in self.tasks}.values():
            with _modules(session.model, held):  # of the shapes that `load` expects
                if adapter is not None:
                    fold(load(session.model, adapter, name=_TRIAL))
                try:
                    for task in (task for task in self.tasks if task.session is session):
                        session.spec = task.spec
                        with _modules(session.model, task.trained):
                            found[task.name], _ = measured(session, task.examples)
                finally:
                    if adapter is not None:
                        remove(unfold(session.model), _TRIAL)
        return {task.name: found[task.name] for task in self.tasks}

    def score(self, adapter: str | Path | None) -> float:
        """The mean over the tasks of what each run is judged by: its accuracy, minus its loss, ..."""
        found = self.metrics(adapter)
        judged = {rows.name: rows.spec.judged_by for rows in self.tasks}
        return statistics.fmean(signed(metric, found[name][metric]) for name, metric in judged.items())


def _task(run: str | Path, name: str, split: str, count: int | None, sessions: dict[str, Session]) -> TaskRows:
    folder = RunFolder(run)
    if not folder.is_run():
        raise IsotuneError(f"{run} is no run's folder, whose {split} rows could be used; give runs of isotune train")
    recipe, adapter = folder.recipe(), adapter_folder(run)
    rows = getattr(load_splits(recipe.data, recipe.task, recipe.seed), split)
    if not rows:
        raise IsotuneError(f"the run in {run} has no {split} rows")
    if count is not None and count < len(rows):
        rows = [rows[index * len(rows) // count] for index in range(count)]
    spec = TaskSpec.read(adapter)
    key = replace(spec, labels=[], positive=None, metric=None).to_json()
    session = sessions.setdefault(key, Session(spec)) if key not in sessions else sessions[key]
    spec = replace(session.spec, labels=spec.labels, positive=spec.positive, metric=spec.metric)
    examples = session.task.examples(rows, session.tokenizer, spec)
    # Rows of one length side by side need no padding.
    examples = sorted(examples, key=lambda example: len(example.get("input_ids", ())))
    return TaskRows(name, session, spec, examples, read_stored(adapter).trained)


@contextmanager
def _modules(model: Any, trained: State) -> Iterator[None]:
    """Give the model these modules for a while; a classifier's head may have another number of labels."""
    before, labels = {path: model.get_submodule(path) for path in trained}, getattr(model, "num_labels", None)
    for path, tensors in trained.items():
        model.set_submodule(path, _filled(before[path], tensors))
    if is_classifier(model):
        model.num_labels = model.config.num_labels = logits_layer(model).out_features
    try:
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)
        if is_classifier(model):
            model.num_labels = model.config.num_labels = labels


def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    whole = nn.ModuleDict({"own": bare_copy(module)})
    for path, layer in list(whole.named_modules()):
        found = tensors.get(f"{path}.weight".removeprefix("own."))
        if isinstance(layer, nn.Linear) and found is not None and found.shape != layer.weight.shape:
            labels, hidden = found.shape
            own = nn.Linear(hidden, labels, layer.bias is not None, layer.weight.device, layer.weight.dtype)
            whole.set_submodule(path, own)
    whole["own"].load_state_dict(tensors)
    return whole["own"]
