"""Running statistics: what training changes of a base that is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from isotune.model.adapted import Trained
from isotune.model.names import base_modules, changed_modules

_AT_FIRST: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""By normalization the number of batches that it had seen when its model got the first adapter."""


def remember_statistics(model: nn.Module) -> None:
    """Take note of the running statistics as they are now."""
    _AT_FIRST.update((module, seen) for _, module, seen in _batches(model))


def moved_statistics(model: nn.Module) -> list[str]:
    """The paths of the normalizations whose running statistics are not any more what they were then."""
    return [path for path, module, seen in _batches(model) if _AT_FIRST.get(module, seen) != seen]


def frozen_statistics(model: nn.Module) -> list[nn.Module]:
    """The normalizations with running statistics of a base that has adapters, all of it but what is trained in full.

    A training has to keep them in evaluation mode; none for a model without adapters, which trains as a whole.
    """
    return [module for _, module, _ in _batches(model)] if any(changed_modules(model)) else []


def _batches(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """The normalizations with running statistics, and the number of batches in them; not what is trained in full."""
    for path, module in base_modules(model):
        seen: Any = module._buffers.get("num_batches_tracked")
        if seen is not None and not seen.is_meta and not isinstance(module, Trained):
            yield path, module, int(seen)
