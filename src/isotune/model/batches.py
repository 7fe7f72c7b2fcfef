"""What a pass over data needs: the model's arguments out of a batch, evaluation mode, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isotune.progress import counting


def arguments_of(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, on the device: a batch is a mapping of keyword arguments, a tuple, or a tensor."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {name: moved(value) for name, value in batch.items()}
    args = batch if isinstance(batch, tuple | list) else (batch,)
    return tuple(map(moved, args)), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context, and every module's own mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def batch_bar(batches: Iterable[Any], passes: int, progress: bool, description: str) -> Iterator[Callable[[], None]]:
    """A bar over the batches, on standard error where that is a terminal; yields what advances it by one."""
    total = len(batches) * passes if isinstance(batches, Sized) else None
    with counting(description, total, progress) as advance:
        yield lambda: advance(1)
