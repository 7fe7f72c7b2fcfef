"""What a model has that neither its base's files nor the adapter hold: who loads the adapter would not get it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from isotune.bare import bare_class
from isotune.checkpoint.as_loaded import AsLoaded, laid_out_as
from isotune.checkpoint.base import StoredBase, folder_at_hand, read_tensor
from isotune.errors import CheckpointError, IsotuneWarning
from isotune.model.adapted import Trained
from isotune.model.names import base_modules, unwrapped
from isotune.model.running import moved_statistics

_SHOWN = 4


def warn_of_unsaved(model: nn.Module) -> None:
    """Warn of heads drawn at random when the base was opened, of added tokens, of running statistics that moved.

    Weights are compared with the base's files by name and shape, where these are at hand.
    """
    new, moved = _not_in_base(model), moved_statistics(model)
    lacking, advice = [], []
    if new:
        lacking.append(f"{_some(new)}, which the base's files lack or have in another shape")
        advice.append(f"train_also={new} trains and stores them")
    if moved:
        lacking.append(f"the running statistics of {_some(moved)}, which training moved")
        advice.append(
            "train_also=[name for name, module in model.named_modules() if hasattr(module, 'running_mean')] stores "
            "statistics, and eval() on these layers while training keeps them as they are"
        )
    if lacking:
        warnings.warn(
            f"the saved adapter does not hold {', nor '.join(lacking)}. A model that loads it will answer "
            f"otherwise than this one. In isotune.adapt, {'; '.join(advice)}.",
            IsotuneWarning,
            stacklevel=3,
        )


def _not_in_base(model: nn.Module) -> list[str]:
    """The modules with parameters that the base's files do not have, or not in their shape."""
    own: Any = unwrapped(model)
    config = getattr(own, "config", None)
    folder = folder_at_hand(getattr(config, "_name_or_path", None) or "", getattr(config, "_commit_hash", None))
    try:
        stored = None if folder is None else StoredBase(folder)
    except CheckpointError:
        stored = None
    if stored is None:  # or in no safetensors files: nothing is known
        return []
    named = dict(_parameters(model))
    prefix = f"{getattr(own, 'base_model_prefix', '')}."
    keys = {name: next((k for k in _spellings(name, prefix) if k in stored.file_of), None) for name in named}
    new = [name for name, key in keys.items() if key is None]
    if new:  # or under another name: transformers knows that of its own models
        loaded = AsLoaded(laid_out_as(bare_class(own), config), stored.file_of)
        new = [name for name in new if name not in loaded] if loaded.sources else []
    for name, key in keys.items():
        if key is not None and named[name].is_floating_point() and not _held(named[name], stored, key):
            new.append(name)
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in new))


def _held(tensor: Tensor, stored: StoredBase, key: str) -> bool:
    """Whether the stored tensor has its shape, or begins with it: a table of positions of which fewer are read."""
    shape = stored.stored_shape(key)
    if [*tensor.shape] == shape:
        return True
    if [*tensor.shape[1:]] != shape[1:] or not shape or len(tensor) > shape[0]:
        return False
    found = read_tensor(stored.folder / stored.file_of[key], key)
    return torch.equal(found[: len(tensor)].to(tensor), tensor.detach())


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters by name, each once, without those of modules trained in full."""
    seen = set()
    for path, module in base_modules(model):
        for name, parameter in () if isinstance(module, Trained) else module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield re.sub(r"parametrizations\.(\w+)\.original$", r"\1", f"{path}.{name}".lstrip(".")), parameter


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """A name with and without the prefix that a model with a head puts before the names of the bare one."""
    return name, name.removeprefix(prefix), f"{prefix}{name}"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
