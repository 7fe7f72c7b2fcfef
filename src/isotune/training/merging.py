"""Merging as a job: from a recipe to a merged model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from isotune.checkpoint.read import holds_adapter
from isotune.errors import OptionError
from isotune.merging.adapters.checks import check_options
from isotune.merging.adapters.merge import merge, open_adapters, open_inputs
from isotune.merging.contract import AnyRule, Job, Rule
from isotune.merging.explain import Explanation, explain
from isotune.merging.models.merge import merge_checkpoints
from isotune.merging.names import model_names
from isotune.merging.recipe import MergeRecipe
from isotune.merging.record import MergeRecord
from isotune.merging.rules.sum import Sum
from isotune.training.folder import adapter_folder


def merge_recipe(
    recipe: MergeRecipe, force: bool = False, resume: bool = False, search: int | None = None, progress: bool = True
) -> MergeRecord:
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
    full = all(folder.is_dir() and not holds_adapter(folder) for folder in folders)
    rule, weights = recipe.built_rule(), recipe.weights
    refusals = _of_full_models(recipe, rule, search) if full else _of_adapters(recipe, rule, resume)
    if reason := next(refusals, None):
        raise OptionError(reason)
    if isinstance(rule, Job):
        return _job(recipe, rule, folders, search, progress)
    names = model_names(recipe.paths, recipe.names)
    if full:
        return merge_checkpoints(
            recipe.paths, rule, recipe.output, recipe.base, weights if any(w != 1 for w in weights) else None, names,
            seed=recipe.seed, vocabulary=recipe.vocabulary, resume=resume, progress=progress,
        )  # fmt: skip
    common: dict[str, Any] = {
        "rule": rule, "names": names, "rank": recipe.rank, "base": recipe.base, "seed": recipe.seed, "force": force,
    }  # fmt: skip
    if search is not None:
        open_adapters(folders, weights=weights, output=recipe.output, modules=recipe.modules, **common)
        from isotune.training.scores import searched  # what evaluates takes long to import

        weights = searched(recipe, folders, search, progress, common)
    return merge(folders, weights=weights, output=recipe.output, modules=recipe.modules, progress=progress, **common)


def _job(recipe: MergeRecipe, rule: Job, folders: list[Path], search: int | None, progress: bool) -> MergeRecord:
    if search is not None or set(recipe.weights) != {1.0}:
        raise OptionError(rule.unweighted)
    if rule.needs_base and recipe.base is None:
        raise OptionError(f"rule {rule.name} needs --base: {rule.needs_base}")
    names = check_options(recipe.paths, rule, None, recipe.names)
    return rule.run(folders, Path(recipe.output or ""), names, recipe.base, progress)


def _of_full_models(recipe: MergeRecipe, rule: AnyRule, search: int | None) -> Iterator[str]:
    """What was asked for and full models cannot have."""
    if search is not None:
        yield "--search measures adapters on the rows of their runs; it cannot search for full models"
    if recipe.rank is not None or recipe.modules is not None:
        yield "--rank and --modules are for adapters, and these are full models; leave them out"
    if not isinstance(rule, Rule) and rule.takes != "models":
        yield f"rule {rule.name} merges adapters, and these are full models"


def _of_adapters(recipe: MergeRecipe, rule: AnyRule, resume: bool) -> Iterator[str]:
    """What was asked for and adapters cannot have."""
    if rule.takes == "models":
        yield f"rule {rule.name} merges full models; of an adapter, transfer_adapter in Python makes another"
    if resume:
        yield "--resume goes on with a merge of full models; one of adapters takes seconds, start it anew"
    if recipe.vocabulary != "error":
        yield "--vocabulary is for full models, and these are adapters; leave it out"


def explain_recipe(recipe: MergeRecipe, force: bool = False) -> Explanation:
    """How the adapters that a recipe names agree and conflict, without merging them."""
    folders = [adapter_folder(path) for path in recipe.paths]
    rule = recipe.built_rule()
    names = model_names(recipe.paths, recipe.names)
    check_options(folders, rule, recipe.weights, names)
    inputs, notes = open_inputs(folders, Sum(), recipe.weights, names, recipe.base, recipe.seed, force)
    found = explain(inputs, rule.name)
    return replace(found, notes=[*found.notes, *notes])
