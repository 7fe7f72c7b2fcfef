"""AI-SARAH: variance-reduced gradients with a step size that is found, not given; for convex finite sums.

    outer:  v = ∇f(w) of all rows
    inner:  ξ(α) = |∇f_S(w - α v) - ∇f_S(w) + v|² for a batch S;  α = min(-ξ'(0) / |ξ''(0)|, α_max),  w' = w - α v,
            v ← ∇f_S(w') - ∇f_S(w) + v;   until |v|² < γ |v of the outer step|²

with `ξ'(0) = -2 <v, H v>` and `ξ''(0) = 2 |H v|² + 2 <v, D³f[v, v]>` by differentiating twice (three times). Of a
quadratic α is `<v, H v> / |H v|²`. α_max is a running harmonic mean of the α found so far, none at first. A step
costs five or six gradients of a batch, and the state is v.

Dropout draws the same in all evaluations of a step; put batch norm in eval mode. Processes do not share the work.

Paper: "AI-SARAH: Adaptive and Implicit Stochastic Recursive Gradient Methods", 2021, arXiv 2102.09700, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isotune.optim.batched import Params

Closure = Callable[[], Tensor]


class AISARAH(Optimizer):
    """Stochastic recursive gradients with steps from the curvature along them; there is no learning rate.

    Args:
        params: Parameters, or groups, all of which are stepped together.
        beta: Of the running harmonic mean that bounds steps.
        gamma: The inner loop ends when the squared length of v has fallen to this share.
        inner_steps: Or after so many steps; None for no limit.
        gauss_newton: Leave the third derivative out of ξ''; cheaper, and the same for quadratics.
    """

    def __init__(
        self,
        params: Params,
        beta: float = 0.999,
        gamma: float = 1 / 32,
        inner_steps: int | None = None,
        gauss_newton: bool = False,
    ) -> None:
        self.gauss_newton = gauss_newton
        loop = {"inner": 0, "began": 0.0, "bound": 0.0, "step_size": 0.0}
        super().__init__(params, {"beta": beta, "gamma": gamma, "inner_steps": inner_steps} | loop)

    def step(self, closure: Closure, full_closure: Closure) -> float:  # type: ignore[override]
        """One inner step, with an outer one before it where it is due.

        Args:
            closure: The loss of one batch, without `backward`; it is called twice and must mean the same rows.
            full_closure: The loss of all rows, without `backward`.

        Returns:
            The batch's loss before the step.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        loop = self.param_groups[0]
        if self._outer_is_due(loop, params):
            for p, g in zip(params, _gradients(full_closure(), params), strict=True):
                self.state[p]["v"] = g.detach().clone()
            loop["inner"], loop["began"] = 0, _dot(self._v(params), self._v(params))
        v = self._v(params)
        devices = [p.device for p in params if p.is_cuda][:1]
        with torch.random.fork_rng(devices):
            loss = closure()
            before = _gradients(loss, params, create_graph=True)
            alpha = self._step_size(loop, before, v, params)
        with torch.no_grad():
            torch._foreach_add_(params, v, alpha=-alpha)
        after = _gradients(closure(), params)
        with torch.no_grad():
            for p, new, old in zip(params, after, before, strict=True):
                self.state[p]["v"] += new - old
        loop["inner"] += 1
        loop["step_size"] = alpha
        return float(loss.detach())

    def _outer_is_due(self, loop: dict[str, Any], params: list[Tensor]) -> bool:
        if any("v" not in self.state[p] for p in params):
            return True
        v, most = self._v(params), loop["inner_steps"]
        return _dot(v, v) < loop["gamma"] * loop["began"] or (most is not None and loop["inner"] >= most)

    def _v(self, params: list[Tensor]) -> list[Tensor]:
        return [self.state[p]["v"] for p in params]

    def _step_size(self, loop: dict[str, Any], before: list[Tensor], v: list[Tensor], params: list[Tensor]) -> float:
        along = sum((g * w).sum() for g, w in zip(before, v, strict=True))
        Hv = _gradients(along, params, create_graph=not self.gauss_newton)
        slope, bend = _dot(v, Hv), _dot(Hv, Hv)
        if not self.gauss_newton:
            curvature = sum((h * w).sum() for h, w in zip(Hv, v, strict=True))
            if isinstance(curvature, Tensor) and curvature.requires_grad:
                bend += _dot(v, _gradients(curvature, params))
        if slope <= 0 or bend == 0:  # no curvature to go by: as far as the bound allows, and it stays
            return 1 / loop["bound"] if loop["bound"] else 0.0
        newton = slope / abs(bend)
        alpha = min(newton, 1 / loop["bound"]) if loop["bound"] else newton
        loop["bound"] = loop["beta"] * loop["bound"] + (1 - loop["beta"]) / newton if loop["bound"] else 1 / newton
        return alpha


def _gradients(value: Any, params: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in params]
    found = torch.autograd.grad(value, params, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.detach().double() * y.detach().double()).sum() for x, y in zip(a, b, strict=True)))
