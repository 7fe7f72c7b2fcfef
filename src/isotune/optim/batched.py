"""An optimizer that steps all parameters of one shape together: what the optimizers of this room share.

A subclass says what a fresh state is and which way to go from stacked gradients; finding, stacking, sharded
parameters, weight decay, closures and the state's file are done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from isotune.linalg.cayley import skew, upper_of
from isotune.optim.adamw import adamw_direction, adamw_state

Group = dict[str, Any]
State = dict[str, Tensor]
Params = Iterable[Any]

MOST = 2**25
"""Numbers that are stacked at most: 128 MiB in fp32."""
ADAMW = "adamw"


class BatchedOptimizer(Optimizer):
    """Steps parameters of one shape together. A group's `algorithm` sends it to AdamW, or keeps it from there.

    By default (None) what `takes` does not take goes to AdamW, with the group's `lr`, `weight_decay`, `adamw_betas`
    and `adamw_eps`. A group's `part` says what the numbers are: "matrix" (dimensions after the first are one, as of
    a convolution's kernels), "matrices" (all but the last two are a batch), or "skew", those above the diagonals of
    skew-symmetric matrices, row by row.
    """

    algorithm: ClassVar[str]
    """Its name, as in a group's `algorithm`."""
    _stacks: dict[int, tuple[State, list[State]]]
    """By the first parameter of a batch: its states along dim 0, and each parameter's views of them."""

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if float(defaults[name]) < 0:
                raise ValueError(f"{name} is {defaults[name]}, and cannot be negative")
        self._stacks = {}
        common = {"algorithm": None, "part": "matrix", "adamw_betas": (0.9, 0.999), "adamw_eps": 1e-8}
        super().__init__(params, common | defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for an `algorithm` or a `part` that is none."""
        asked, part = param_group.get("algorithm"), param_group.get("part", "matrix")
        if asked not in (None, ADAMW, self.algorithm):
            raise ValueError(f"a group's algorithm is {asked!r}; here it is {self.algorithm!r} or {ADAMW!r}")
        if part not in PARTS:
            raise ValueError(f"a group's part is {part!r}; it is one of {', '.join(PARTS)}")
        super().add_param_group(param_group)
        if asked == self.algorithm:
            for p in self.param_groups[-1]["params"]:
                if not self.takes(p) and part != "skew":
                    raise ValueError(f"{self.algorithm} steps matrices; a parameter has the shape {tuple(p.shape)}")

    def takes(self, p: Tensor) -> bool:
        """Whether the algorithm is for parameters like this one."""
        return True

    def fresh(self, G: Tensor, group: Group) -> State:
        """The state before the first step, of one gradient as its part has it; by default AdamW's."""
        return adamw_state(G)

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        """What to subtract, times the rate and its factor: of gradients and states that are stacked along dim 0.

        The state is changed in place, and G may be. Of the parameters in the batch, `stacked` makes the same. By
        default it is AdamW's way.
        """
        return adamw_direction(G, state, group["adamw_betas"], group["adamw_eps"])

    def factor(self, shape: torch.Size, group: Group) -> float:
        """A factor on the learning rate for what has this shape, of which the last two sides are a matrix's."""
        return 1.0

    def shrinks(self, group: Group) -> float:
        """The share of themselves that parameters lose in a step."""
        return float(group["lr"] * group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for own, batch in self._batches(group):
                self._step(batch, group, own)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with every tensor in the dtype in which it was kept."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[p][name] = value.detach().to(p.device, copy=True)

    def _batches(self, group: Group) -> Iterator[tuple[bool, list[Tensor]]]:
        """Parameters to step together, and whether by this optimizer's own algorithm."""
        found: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} takes no sparse gradients")
            own = group["algorithm"] != ADAMW and (self.takes(p) or group["part"] == "skew")
            where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else p.device
            found.setdefault((own, tuple(p.shape), p.dtype, where), []).append(p)
        for (own, *_), alike in found.items():
            most = max(1, MOST // max(alike[0].numel(), 1))
            for first in range(0, len(alike), most):
                yield own, alike[first : first + most]

    def _step(self, batch: list[Tensor], group: Group, own: bool) -> None:
        G = self.stacked([gradient_of(p) for p in batch], group, own)
        G = G.to(torch.promote_types(G.dtype, torch.float32))
        state = self._stacked_state(batch, G, group, own)
        how = type(self) if own else BatchedOptimizer  # which by itself is AdamW
        rate = float(group["lr"]) * how.factor(self, G.shape, group)
        shrinks = how.shrinks(self, group)
        U = how.direction(self, G, batch, state, group)
        if isinstance(batch[0], DTensor):
            for name, stacked in state.items():
                for p, t in zip(batch, stacked.unbind(), strict=True):
                    self.state[p][name].copy_(as_sharded(t, p))
        back = PARTS[group["part"]][1] if own else AS_IT_IS[1]
        steps = back(U, batch[0].shape).unbind()
        if isinstance(batch[0], DTensor):
            steps = tuple(as_sharded(u, p) for p, u in zip(batch, steps, strict=True))
        if shrinks:
            torch._foreach_mul_(batch, 1 - shrinks)
        torch._foreach_add_(batch, steps, alpha=-rate)

    def stacked(self, tensors: list[Tensor], group: Group, own: bool = True) -> Tensor:
        """Parameters, or gradients, as their part has them, along a new dim 0; of sharded ones the whole."""
        view = PARTS[group["part"]][0] if own else AS_IT_IS[0]
        return view(torch.stack([whole(t) for t in tensors]))

    def _stacked_state(self, batch: list[Tensor], G: Tensor, group: Group, own: bool) -> State:
        """The states of parameters along a new dim 0, of which each parameter's own are views from then on."""
        for p, g in zip(batch, G.unbind(), strict=True):
            if not self.state[p]:
                fresh = (type(self) if own else BatchedOptimizer).fresh(self, g, group)
                self.state[p].update({name: as_sharded(t, p) for name, t in fresh.items()})
        states = [self.state[p] for p in batch]
        kept, views = self._stacks.get(id(batch[0]), ({}, []))
        if len(views) == len(states) and all(map(_same, states, views)):
            return kept
        stacks = {name: torch.stack([whole(state[name]) for state in states]) for name in states[0]}
        if not isinstance(batch[0], DTensor):
            for i, state in enumerate(states):
                state.update({name: stack[i] for name, stack in stacks.items()})
            self._stacks[id(batch[0])] = stacks, [dict(state) for state in states]
        return stacks


def _same(state: State, views: State) -> bool:
    return all(t is views.get(name) for name, t in state.items())


def _size(packed: int) -> int:
    """The side of a skew-symmetric matrix with so many numbers above its diagonal."""
    return round((1 + (1 + 8 * packed) ** 0.5) / 2)


PARTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, torch.Size], Tensor]]] = {
    "matrix": (lambda t: t.flatten(2) if t.dim() > 2 else t, lambda u, shape: u.reshape(-1, *shape)),
    "matrices": (lambda t: t, lambda u, shape: u),
    "skew": (lambda t: skew(t, _size(t.shape[-1])), lambda u, shape: upper_of(u)),
}
"""How to see stacked parameters as (k, ..., m, n), and such changes as (k, *shape) again."""
AS_IT_IS = PARTS["matrices"]


def whole(t: Tensor) -> Tensor:
    """`t` itself, gathered from all processes where they have its parts."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradient_of(p: Tensor) -> Tensor:
    """The parameter's gradient, gathered likewise."""
    assert p.grad is not None
    return whole(p.grad)


def as_sharded(t: Tensor, p: Tensor) -> Tensor:
    """`t` cut among processes as the parameter p is, where it has a row for each of p's."""
    if not isinstance(p, DTensor) or t.shape[:1] != p.shape[:1]:
        return t
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)
