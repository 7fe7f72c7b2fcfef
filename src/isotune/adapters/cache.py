"""What an adapter keeps between calls because it depends on tensors that rarely change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """What was made from some tensors, made anew when one of them is replaced, changed in place, cast or moved.

    A copy or a pickle starts empty. Writing through `.data` in place goes unseen, as it does by autograd, and so do
    the steps of torch's fused optimizers: what depends on parameters that learn has to be forgotten where they do.
    """

    def __init__(self) -> None:
        self._of: list[Any] = []
        self._state: list[Any] = []
        self._value: T | None = None

    def get(self, of: Sequence[Tensor], make: Callable[[], T], dtype: torch.dtype | None = None) -> T:
        """What `make` makes from the tensors `of`, of any shape, and for this dtype."""
        state = [dtype, *((t._version, t.dtype, t.device) for t in of)]
        value = self._value
        if value is None or state != self._state or any(ref() is not t for ref, t in zip(self._of, of, strict=True)):
            self._of, self._state, self._value = [weakref.ref(t) for t in of], state, (value := make())
        return value

    def forget(self) -> None:
        """Make it anew the next time."""
        self._value = None

    @property
    def value(self) -> T | None:
        """What is kept; None where nothing is."""
        return self._value

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()
