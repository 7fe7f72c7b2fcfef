"""Merging as a job: from a recipe to a merged model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isotune.checkpoint.read import holds_adapter
from isotune.errors import OptionError
from isotune.merging.adapters.checks import check_options
from isotune.merging.adapters.merge import Merged, merge, open_adapters, open_inputs
from isotune.merging.contract import AnyRule, Rule
from isotune.merging.explain import Explanation, explain
from isotune.merging.models.merge import MergedCheckpoint, merge_checkpoints
from isotune.merging.names import model_names
from isotune.merging.recipe import MergeRecipe
from isotune.merging.reversible.adapters import compress_adapters
from isotune.merging.reversible.stored import Reversible
from isotune.merging.rules.rmm import RMM
from isotune.merging.rules.sum import Sum
from isotune.merging.rules.symmetry import TransferRule
from isotune.merging.symmetry.transfer import Transfer, transfer
from isotune.training.folder import adapter_folder


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
    folders = [adapter_folder(path) for path in recipe.paths]
    rule, weights = recipe.built_rule(), recipe.weights
    names = model_names(recipe.paths, recipe.names)
    adapters = [holds_adapter(folder) for folder in folders]
    if not any(adapters) and all(folder.is_dir() for folder in folders):
        return _full_models(recipe, rule, resume, search, progress)
    if isinstance(rule, TransferRule):
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
        from isotune.training.scores import searched  # what evaluates takes long to import

        weights = searched(recipe, folders, search, progress, common)
    return merge(folders, weights=weights, output=recipe.output, modules=recipe.modules, progress=progress, **common)


def _full_models(
    recipe: MergeRecipe, rule: AnyRule, resume: bool, search: int | None, progress: bool
) -> MergedCheckpoint | Transfer:
    assert recipe.output is not None
    if search is not None:
        raise OptionError("--search measures adapters on the rows of their runs; it cannot search for full models")
    if recipe.rank is not None or recipe.modules is not None:
        raise OptionError("--rank and --modules are for adapters, and these are full models; leave them out")
    if isinstance(rule, TransferRule):
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
