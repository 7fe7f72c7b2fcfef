"""What an adapter makes of its parameters alone, made once a step where activation checkpointing runs a layer twice.

The r x r algebra of a rotation does not depend on the rows, so that a recomputation would only repeat it. It runs
outside of what the checkpoint records, and the recomputation gets the values that the forward pass made:

    use_reentrant=False   from the graph's own node, which lives, and keeps them, as long as the graph can go backward
    use_reentrant=True    with their graph, which the forward pass (without one) keeps for the recomputation to take

So nothing is kept after backward. Without checkpointing nothing is kept at all, and a second pass computes anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from isotune.linalg.autograd import Node, transformed

Tensors = tuple[Tensor, ...]


class Once:
    """Values of one adapter for one step. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._state: list[Any] = []
        self._node: Callable[[], Any] = _nothing
        self._graph: Tensors | None = None

    def get(self, adapter: nn.Module, make: Callable[[], Tensors], dtype: torch.dtype | None = None) -> Tensors:
        """What `make` makes for this dtype, from the parameters of the adapter alone: tensors of any shape."""
        if transformed():
            return make()
        graph = torch.is_grad_enabled()
        again = graph and torch._C._current_graph_task_id() != -1
        # What records or replaces each operation, as selective checkpointing does, is to see all of them both times.
        recorded = torch._C._len_torch_dispatch_stack() > 0
        checkpointed = (again or _hooked()) if graph else adapter.training
        if not checkpointed or recorded:
            return make()
        state = [dtype, *((id(p), p._version) for p in adapter.parameters())]
        if again and (found := self._recalled(state)) is not None:
            return found
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            values = make()
            if not any(v.requires_grad for v in values):
                return values
            self._state = state
            if graph:
                values = _Anchor.run(*values)
                self._node = weakref.ref(next(v.grad_fn for v in values if v.requires_grad))
                return values
        self._graph = values
        return tuple(v.detach() for v in values)

    def _recalled(self, state: Sequence[Any]) -> Tensors | None:
        """What an earlier pass of this step made; None where there is nothing, or backward has been there."""
        taken, self._graph = self._graph, None
        if state != self._state:
            return None
        if taken is not None:
            return taken
        node = self._node()
        try:
            return None if node is None else node.saved_tensors
        except RuntimeError:  # freed
            return None

    def __reduce__(self) -> tuple[Any, ...]:
        return Once, ()


class _Anchor(Node):
    """The values as they are, in a node that can be found again."""

    @staticmethod
    def forward(*values: Tensor) -> Tensors:
        return tuple(v.view_as(v) for v in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        frozen = [v for v, trained in zip(output, ctx.needs_input_grad, strict=True) if not trained]
        ctx.mark_non_differentiable(*frozen)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads


def _hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _nothing() -> None:
    return None
