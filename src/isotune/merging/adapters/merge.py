"""Merge adapters into one adapter, without the base model where the methods allow, layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import LoRA
from isotune.adapters.settings import Settings
from isotune.checkpoint.base import StoredBase, local_folder
from isotune.checkpoint.files import check_writable
from isotune.checkpoint.save import write_parts
from isotune.checkpoint.stored import State
from isotune.errors import CheckpointError, OptionError
from isotune.folders import MERGE, TASK
from isotune.linalg.change import Change, size
from isotune.linalg.low_rank import Factored, from_dense, truncated
from isotune.merging.adapters.checks import check_models, check_options, read_models
from isotune.merging.adapters.inputs import AdapterInputs, Model
from isotune.merging.adapters.modules import merged_modules, task_file
from isotune.merging.contract import AnyRule, RotationRule, Rule
from isotune.merging.record import MergedAdapter
from isotune.merging.registry import rule as rule_by_name
from isotune.merging.run import Run
from isotune.progress import counting
from isotune.sites import Site

Parts = dict[str, tuple[Site, Settings, Adapter]]


def merge(
    adapters: Sequence[str | Path],
    rule: str | AnyRule = "sum",
    weights: Sequence[float] | None = None,
    output: str | Path = "merged",
    *,
    options: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
    rank: int | None = None,
    base: str | Path | None = None,
    modules: str | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> MergedAdapter:
    """Merge the adapters in several folders, isotune's or PEFT's, into one, and write it to `output`.

    Rules on changes write a LoRA in PEFT's layout; rules on rotations an adapter of the inputs' method. The folder
    also gets `merge.json`, which is this function's result.

    Args:
        adapters: The folders. The adapters may differ in method, rank and layers.
        rule: The rule, or its name; see `isotune.merging.registry.rule_names`.
        weights: One for each adapter; by default 1.
        output: The folder to write: absent, empty, or an adapter's.
        options: The rule's options, where it is given by name.
        names: Names of the adapters; by default those of their folders. Random rules draw by name.
        rank: The largest rank of the merged adapter; by default what the change has, for rules on single entries at
            most the sum of the adapters' ranks. What is cut off is reported.
        base: The base model's folder, for methods whose change depends on it; by default what their configs say.
        modules: What becomes of modules trained in full, such as classifier heads, where they differ: "average",
            "drop", or the name of the adapter whose modules are kept.
        seed: Seed of rules that draw.
        force: Merge adapters that name different bases.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Raises:
        OptionError: An unknown rule or option, or a wrong number of weights or names.
        CheckpointError: Adapters that cannot be read or do not fit together; all problems in one message.
    """
    started = time.perf_counter()
    if isinstance(rule, str):
        rule = rule_by_name(rule, **(options or {}))
    elif options:
        raise OptionError(f"options= go with a rule's name, and {rule.name} is one with its own: {rule!r}")
    inputs, trained, notes = open_adapters(
        adapters, rule, weights, output, names, rank=rank, base=base, modules=modules, seed=seed, force=force
    )
    with counting(f"merging, {rule.name}", len(inputs.paths), progress) as advance:
        if isinstance(rule, RotationRule):
            parts = _rotations(rule, inputs, advance)
            errors: dict[str, float] = {}
            norms: dict[str, float] = {}
        else:
            assert isinstance(rule, Rule)
            parts, errors, norms = _changes(rule, inputs, rank, advance)
    record = MergedAdapter(
        path=Path(output),
        rule=rule.name,
        options=rule.model_dump(mode="json"),
        models={model.name: model.weight for model in inputs.models},
        folders=[str(folder) for folder in adapters],
        base=None if base is None else str(base),
        seed=seed,
        ranks={path: getattr(settings, "rank", 0) for path, (_, settings, _) in parts.items()},
        errors=errors,
        error=_overall(errors, norms),
        norms=norms,
        modules=sorted(trained),
        notes=notes,
        seconds=time.perf_counter() - started,
    )
    bases = [model.stored.base for model in inputs.models]
    headers = [model.stored.header for model in inputs.models if model.stored.header]
    write_parts(
        output,
        parts,
        trained,
        next((base for base in bases if base.config), bases[0]),
        {path: entry for header in headers for path, entry in header["sites"].items()},
        files={MERGE: record.text(), TASK: task_file(inputs.models, modules)},
    )
    return record


def open_adapters(
    adapters: Sequence[str | Path],
    rule: AnyRule,
    weights: Sequence[float] | None,
    output: str | Path,
    names: Sequence[str] | None = None,
    *,
    rank: int | None = None,
    base: str | Path | None = None,
    modules: str | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[AdapterInputs, State, list[str]]:
    """What `merge` starts from: the adapters, the modules trained in full to keep, and notes. Raises as it does."""
    if not isinstance(rule, Rule | RotationRule):
        raise OptionError(f"rule {rule.name} does not give one adapter; isotune merge --rule {rule.name} is for it")
    names = check_options(adapters, rule, weights, names)
    if rank is not None and rank < 1:
        raise OptionError(f"rank={rank} is not usable; it must be at least 1")
    if rank is not None and isinstance(rule, RotationRule):
        raise OptionError(f"rank= is for rules on changes; {rule.name} merges rotations, whose rank it keeps")
    if Path(output).resolve() in [Path(adapter).resolve() for adapter in adapters]:
        raise OptionError(f"{output} is one of the adapters to merge; the result needs another folder")
    check_writable(output)
    weights = [1.0] * len(adapters) if weights is None else weights
    inputs, notes = open_inputs(adapters, rule, weights, names, base, seed, force)
    return inputs, merged_modules(inputs.models, modules), notes


def open_inputs(
    adapters: Sequence[str | Path],
    rule: AnyRule,
    weights: Sequence[float],
    names: Sequence[str],
    base: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[AdapterInputs, list[str]]:
    """The adapters, checked against each other and the rule, and notes on how they differ."""
    models = read_models(adapters, names, weights, None)
    stored_base = _base(models, base)
    models = [replace(m, stored=m.stored.completed(stored_base)) for m in models]
    if stored_base is not None:
        models = [replace(m, parts=type(m.parts)(m.stored, stored_base)) for m in models]
    inputs = AdapterInputs(models, stored_base, seed, rule.statistic if isinstance(rule, Rule) else None)
    return inputs, check_models(inputs, rule, force)


def _base(models: Sequence[Model], base: str | Path | None) -> StoredBase | None:
    """The base: as asked for, or where a method needs it and the first adapter's config names a folder at hand."""
    if base is not None:
        return StoredBase(base)
    named = models[0].stored.base.name
    needed = any(model.stored.rows or model.needs_base(model.paths[0]) for model in models if model.paths)
    return StoredBase(named) if needed and named and local_folder(named) else None


def _changes(
    rule: Rule, inputs: AdapterInputs, rank: int | None, advance: Any
) -> tuple[Parts, dict[str, float], dict[str, float]]:
    """The merged change of every layer as a LoRA, the error of its rank, and its norm."""
    found, errors, norms = {}, {}, {}
    run = Run(rule, lambda: inputs)
    with torch.no_grad():
        for site, change in run:
            limit = sum(c.rank if isinstance(c, Factored) else min(c.shape) for c in site.changes)
            norms[site.path] = _finite_size(site.path, change)
            (B, A), errors[site.path] = as_factors(change, rank or limit)
            found[site.path] = Factored(B.contiguous(), A.contiguous())
            advance(1)
        # One layer at a time: the factors of all layers are what takes memory.
        parts = {path: _lora(inputs.site(path), found.pop(path), run.factor) for path in list(found)}
    return parts, errors, {path: abs(run.factor) * norm for path, norm in norms.items()}


def as_factors(change: Change, rank: int) -> tuple[Factored, float]:
    """The change with at most `rank` columns and rows (but at least one), and the relative error of that."""
    rank = max(1, min(rank, *change.shape))
    if not isinstance(change, Factored):
        return from_dense(change, rank)
    if change.rank > rank:
        return truncated(change, rank)
    if change.rank == 0:
        B, A = change
        change = Factored(B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1]))
    return change, 0.0


def _lora(site: Site, factors: Factored, factor: float) -> tuple[Site, Settings, Adapter]:
    settings = LoRA(rank=factors.rank)
    B, A = factors if factor == 1 else factors.scaled(factor)
    return site, settings, settings.adapter(A, B, site)


def _rotations(rule: RotationRule, inputs: AdapterInputs, advance: Any) -> Parts:
    found: Parts = {}
    for path in inputs.paths:
        site, first, _ = inputs.owners(path)[0].adapter(path)
        parts, weights = [], []
        try:
            for model in inputs.models:
                if path in model.stored.settings:
                    parts.append(model.adapter(path)[1:])
                elif rule.absent == "identity":
                    parts.append(_unturned(first, site, model.name))
                else:
                    continue
                weights.append(model.weight)
            found[path] = (site, *rule.merge(site, parts, weights))
        except OptionError as error:
            raise OptionError(f"{path!r}: {error}") from None
        advance(1)
    return found


def _unturned(settings: Settings, site: Site, name: str) -> tuple[Settings, Adapter]:
    """An adapter that leaves the layer as it is. `start` says how training began, which a file may not know."""
    if "start" in type(settings).model_fields:
        settings = settings.model_copy(update={"start": None})
    if not settings.identity_at_start:
        raise OptionError(
            f"{name} leaves this layer alone, and {settings.name} is never the identity, so that there "
            "is no mean; merge adapters of the same layers, or use rule compose"
        )
    return settings, settings.build(site, torch.Generator().manual_seed(0))


def _finite_size(path: str, change: Change) -> float:
    """The change's norm. Raises CheckpointError where it is not finite."""
    if not math.isfinite(found := size(change)):
        raise CheckpointError(f"the merged change of {path!r} is not finite; the weights are too large for float32")
    return found


def _overall(errors: dict[str, float], norms: dict[str, float]) -> float:
    total = math.fsum(norms[path] ** 2 for path in errors)
    return math.sqrt(math.fsum((errors[p] * norms[p]) ** 2 for p in errors) / total) if total else 0.0
