"""Merging as a job: from a recipe to a merged model, and the score of merged adapters on the runs' own rows."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from isotune.checkpoint.files import CONFIG
from isotune.checkpoint.load import load
from isotune.checkpoint.stored import State, read_stored
from isotune.errors import IsotuneError, OptionError
from isotune.merging.adapters import Merged, merge, open_adapters, open_inputs
from isotune.merging.checkpoints import MergedCheckpoint, merge_checkpoints
from isotune.merging.checks import check_options
from isotune.merging.contract import AnyRule, Rule
from isotune.merging.explain import Explanation, explain
from isotune.merging.names import model_names
from isotune.merging.recipe import MergeRecipe
from isotune.merging.reversible import Reversible
from isotune.merging.reversible_adapters import compress_adapters
from isotune.merging.rules.rmm import RMM
from isotune.merging.rules.sum import Sum
from isotune.merging.rules.symmetry import Symmetry
from isotune.merging.search import search_weights
from isotune.merging.transfer import Transfer, transfer
from isotune.model.attach import remove
from isotune.model.fold import fold, unfold
from isotune.model.layers import AdaptedLayer, TrainedModule
from isotune.training.data import load_splits
from isotune.training.evaluation import measured
from isotune.training.export import adapter_folder
from isotune.training.folder import RunFolder
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks import Example, classification_examples

_TRIAL = "isotune-merged"


@dataclass(frozen=True)
class Compressed:
    """What rule rmm wrote."""

    path: Path
    errors: dict[str, float]
    """For each adapter the largest relative error of a layer's change, Frobenius."""
    predicted: dict[str, float]
    """For each adapter the largest error of a layer's factors, as the singular values left out give it."""
    values: int
    """The numbers stored."""
    separate_values: int
    """The numbers that the adapters by themselves have."""

    @classmethod
    def of(cls, path: Path, found: Reversible) -> Compressed:
        """A summary of what was written to `path`."""
        return cls(
            path,
            {name: max(error.change for error in sites.values()) for name, sites in found.errors.items()},
            {name: max(error.predicted for error in sites.values()) for name, sites in found.errors.items()},
            found.values,
            found.separate_values,
        )


Outcome = Merged | MergedCheckpoint | Compressed | Transfer


def merge_recipe(
    recipe: MergeRecipe, force: bool = False, resume: bool = False, search: int | None = None, progress: bool = True
) -> Outcome:
    """Merge what the recipe names, adapters or full models, and write it to its output folder.

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
    rule, weights = recipe.built_rule(), recipe.weights
    names = model_names(recipe.paths, recipe.names)
    adapters = [(folder / CONFIG).is_file() for folder in folders]
    if not any(adapters) and all(folder.is_dir() for folder in folders):
        return _full_models(recipe, rule, resume, search, progress)
    if isinstance(rule, Symmetry):
        raise OptionError("rule symmetry merges full models; of an adapter, transfer_adapter in Python makes another")
    if resume:
        raise OptionError(
            "--resume goes on with a merge of full models; one of adapters takes seconds, start it anew"
        )
    if recipe.vocabulary != "error":
        raise OptionError("--vocabulary is for full models, and these are adapters; leave it out")
    if isinstance(rule, RMM):
        if search is not None or len(set(weights)) > 1:
            raise OptionError("rule rmm keeps every adapter as it is; weights have no meaning for it")
        found = compress_adapters(
            folders, recipe.output, names, base=recipe.base, progress=progress, **rule.model_dump()
        )
        return Compressed.of(Path(recipe.output), found)
    common: dict[str, Any] = {
        "rule": rule, "names": names, "rank": recipe.rank, "base": recipe.base, "seed": recipe.seed,
        "force": force,
    }  # fmt: skip
    if search is not None:
        open_adapters(folders, weights=weights, output=recipe.output, modules=recipe.modules, **common)
        tasks = Tasks(recipe.paths, "validation", names)

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


def _full_models(
    recipe: MergeRecipe, rule: AnyRule, resume: bool, search: int | None, progress: bool
) -> MergedCheckpoint | Transfer:
    assert recipe.output is not None
    if search is not None:
        raise OptionError("--search measures adapters on the rows of their runs; it cannot search for full models")
    if recipe.rank is not None or recipe.modules is not None:
        raise OptionError("--rank and --modules are for adapters, and these are full models; leave them out")
    if isinstance(rule, Symmetry):
        if set(recipe.weights) != {1.0}:
            raise OptionError(
                "weights have no meaning for rule symmetry; --set scale=0.5 says how much of the skill is added"
            )
        if recipe.base is None:
            raise OptionError("rule symmetry needs --base: the model that the second one, the skilled, started from")
        check_options(recipe.paths, rule, None, None)
        target, skilled = recipe.paths
        return transfer(target, recipe.base, skilled, recipe.output, **rule.model_dump())
    if not isinstance(rule, Rule):
        raise OptionError(f"rule {rule.name} merges adapters, and these are full models")
    given = recipe.weights if any(weight != 1 for weight in recipe.weights) else None
    return merge_checkpoints(
        recipe.paths, rule, recipe.output, recipe.base, given, recipe.names, seed=recipe.seed,
        vocabulary=recipe.vocabulary, resume=resume, progress=progress,
    )  # fmt: skip


def explain_recipe(recipe: MergeRecipe, force: bool = False) -> Explanation:
    """How the adapters that a recipe names agree and conflict, without merging them."""
    folders = [adapter_folder(path) for path in recipe.paths]
    rule = recipe.built_rule()
    names = model_names(recipe.paths, recipe.names)
    check_options(folders, rule, recipe.weights, names)
    inputs, notes = open_inputs(folders, Sum(), recipe.weights, names, recipe.base, recipe.seed, force)
    found = explain(inputs, rule.name)
    return replace(found, notes=[*found.notes, *notes])


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
        sessions: dict[tuple[Any, ...], Session] = {}
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
                        with _modules(session.model, task.trained):
                            found[task.name], _ = measured(session, task.examples)
                finally:
                    if adapter is not None:
                        remove(unfold(session.model), _TRIAL)
        return {task.name: found[task.name] for task in self.tasks}

    def score(self, adapter: str | Path | None) -> float:
        """The mean over the tasks: of the accuracy, or of minus the loss for language models."""
        found = self.metrics(adapter).values()
        return sum(metrics.get("accuracy", -metrics["loss"]) for metrics in found) / len(found)


def _task(
    run: str | Path, name: str, split: str, count: int | None, sessions: dict[tuple[Any, ...], Session]
) -> Task:
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
    key = (spec.task, spec.model, spec.pooling, spec.max_length, spec.dtype, spec.separator)
    session = sessions.setdefault(key, Session(spec)) if key not in sessions else sessions[key]
    if spec.task == "classification":
        examples = classification_examples(rows, session.tokenizer, spec.labels, session.max_length)
    else:
        examples = session.examples(rows)
    # Rows of one length side by side need no padding.
    examples = sorted(examples, key=lambda example: len(example["input_ids"]))
    return Task(name, session, examples, read_stored(adapter).trained)


@contextmanager
def _modules(model: nn.Module, trained: State) -> Iterator[None]:
    """Give the model these modules for a while; a classifier's head may have another number of labels."""
    before = {path: model.get_submodule(path) for path in trained}
    for path, tensors in trained.items():
        model.set_submodule(path, _filled(before[path], tensors))
    try:
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    own = copy.deepcopy(module.base_layer if isinstance(module, AdaptedLayer | TrainedModule) else module)
    if isinstance(own, nn.Linear) and own.weight.shape != tensors["weight"].shape:
        labels, hidden = tensors["weight"].shape
        own = nn.Linear(hidden, labels, dtype=own.weight.dtype, device=own.weight.device)
    own.load_state_dict(tensors)
    return own
