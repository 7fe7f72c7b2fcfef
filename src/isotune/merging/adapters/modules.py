"""What becomes of modules that several adapters trained in full, such as classifier heads, when they are merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotune.checkpoint.stored import State
from isotune.errors import CheckpointError, OptionError
from isotune.folders import TASK
from isotune.merging.adapters.inputs import Model

"""What training leaves beside an adapter, so that it can be evaluated again."""


def merged_modules(models: Sequence[Model], policy: str | None) -> State:
    """The modules trained in full that the merged adapter holds, by path.

    Those that are the same in all adapters that have them are kept; for others the policy decides.
    """
    names = [model.name for model in models]
    if policy == "drop":
        return {}
    if policy in names:
        return models[names.index(policy)].stored.trained
    if policy not in (None, "average"):
        raise OptionError(f"modules={policy!r} is unknown; say average, drop, or an adapter: {', '.join(names)}")
    found: State = {}
    for path in dict.fromkeys(p for model in models for p in model.stored.trained):
        owners = [(model.weight, model.stored.trained[path]) for model in models if path in model.stored.trained]
        first = owners[0][1]
        shapes = {tuple((key, tuple(t.shape)) for key, t in sorted(state.items())) for _, state in owners}
        if len(shapes) == 1 and all(state[key].equal(first[key]) for _, state in owners for key in first):
            found[path] = first
        elif policy is None or len(shapes) > 1:
            why = "of different shapes" if len(shapes) > 1 else "with different values"
            averaged = "" if len(shapes) > 1 else "modules=average (--modules average), "
            raise CheckpointError(
                f"{len(owners)} adapters hold the module {path!r}, trained in full, {why}; say what to do: {averaged}"
                "modules=drop, or the name of the adapter whose modules to keep"
            )
        else:
            found[path] = {key: _average([(w, state[key]) for w, state in owners], path) for key in first}
    return found


def _average(owners: Sequence[tuple[float, Tensor]], path: str) -> Tensor:
    total = sum(weight for weight, _ in owners)
    if total == 0:
        raise OptionError(f"the weights sum to zero, so that there is no average of the module {path!r}")
    mean = sum((weight / total * tensor.float() for weight, tensor in owners), torch.zeros(()))
    return mean.to(owners[0][1].dtype)


def task_file(models: Sequence[Model], policy: str | None) -> str | None:
    """What `isotune evaluate` needs to know, where all adapters agree on it or one lends its modules."""
    files = {model.name: model.stored.path / TASK for model in models}
    if policy in files:
        files = {policy: files[policy]}
    texts = {file.read_text() if file.is_file() else None for file in files.values()}
    (text, *others) = texts
    return None if others else text
