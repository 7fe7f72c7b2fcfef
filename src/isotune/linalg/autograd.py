"""Base class of our own autograd functions."""

from __future__ import annotations

from typing import Any

import torch


def transformed() -> bool:
    """Whether `torch.func` or `torch.compile` is at work, which follow a function's every step."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Node(torch.autograd.Function):
    """An autograd function, with `forward` and `setup_context` apart, that `torch.func` can transform."""

    generate_vmap_rule = True

    @classmethod
    def run(cls, *args: Any) -> Any:
        """`apply`, without what it does for `torch.func` (some 25 µs a call) where nothing is transformed."""
        if transformed():
            return cls.apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
