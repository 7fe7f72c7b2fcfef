"""APTS, data-parallel: a trust region whose step is made by workers, each on its own rows, and judged on all of them.

    F_i(u) = f_i(u) + <g - g_i, u - w>    so that every worker's objective has the whole gradient g at w
    worker i:  up to `local_steps` steps of steepest descent on F_i within the radius D / N of w: s_i
    s = Σ s_i;  ρ = (f(w) - f(w + s)) / Σ (F_i(w) - F_i(w + s_i));  ρ < ¼: back, and D shrinks; ρ > ¾: D grows
    then up to `global_steps` steps of steepest descent on f within D

f, the mean of the workers' losses, never rises. There is no learning rate. The correction `g - g_i` is in the
gradient that workers descend along; in the authors' code it is added after `backward` and changes the loss alone.
Steps are first-order ones; the paper's quasi-Newton model is not here. Keep dropout and batch norm in eval mode: f
must be a function.

Paper: "Data-Parallel Neural Network Training via Nonlinearly Preconditioned Trust-Region Method", 2025, arXiv
2502.05133.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from isotune.optim.batched import Params

Closure = Callable[[], Tensor]


class Judgement(NamedTuple):
    """When a step is taken, and how the radius follows: times `shrink` below `low`, times `grow` above `high`."""

    low: float
    high: float
    shrink: float
    grow: float


class APTS(Optimizer):
    """Trust-region steps from workers' own rows, as many virtual workers in a process as there are closures.

    Args:
        params: Parameters, or groups, all of which are stepped together.
        radius: D at the start, in the 2-norm of all parameters.
        min_radius: The least D.
        max_radius: The largest D.
        local_steps: Steps of each worker.
        global_steps: Steps of all after them; 0 for none.
        tolerance: What workers must promise for their step to be tried.
        process_group: Of processes with workers of their own; by default there is one process.
    """

    LOCAL = Judgement(0.3, 0.7, 0.6, 1.5)
    GLOBAL = Judgement(0.25, 0.75, 0.9, 1.2)

    def __init__(
        self,
        params: Params,
        radius: float = 0.1,
        min_radius: float = 1e-4,
        max_radius: float = 2.0,
        local_steps: int = 3,
        global_steps: int = 1,
        tolerance: float = 1e-6,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 < min_radius <= radius <= max_radius:
            raise ValueError(f"0 < min_radius <= radius <= max_radius; found {min_radius}, {radius}, {max_radius}")
        self.process_group = process_group
        bounds = {"radius": radius, "min_radius": min_radius, "max_radius": max_radius}
        steps = {"local_steps": local_steps, "global_steps": global_steps, "tolerance": tolerance}
        super().__init__(params, bounds | steps)

    def step(self, closures: Sequence[Closure]) -> float:  # type: ignore[override]
        """One outer iteration.

        Args:
            closures: Of each worker in this process its loss, without `backward`, a function of the parameters alone.

        Returns:
            f at the end: never above f at the start.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        region = self.param_groups[0]
        w = parameters_to_vector(params).detach().clone()
        own = [self._evaluate(params, w, closure) for closure in closures]
        workers = round(float(self._summed(w.new_tensor(float(len(closures))))))
        g = self._summed(sum(gradient for _, gradient in own) + torch.zeros_like(w)) / workers
        f = self._mean([loss for loss, _ in own], workers, w)
        s, promised = torch.zeros_like(w), 0.0
        for closure, (loss, gradient) in zip(closures, own, strict=True):
            step, fell = self._local(params, w, closure, loss, g - gradient, g, region["radius"] / workers)
            s, promised = s + step, promised + fell
        together = self._summed(torch.cat([s, s.new_tensor([promised])]))
        s, promised = together[:-1], float(together[-1]) / workers
        w, f = self._tried(params, closures, w, s, f, promised, workers)
        for _ in range(region["global_steps"]):
            own = [self._evaluate(params, w, closure) for closure in closures]
            g = self._summed(sum(gradient for _, gradient in own) + torch.zeros_like(w)) / workers
            length = float(torch.linalg.vector_norm(g))
            if length == 0:
                break
            far = region["radius"]
            w, f = self._tried(params, closures, w, g * (-far / length), f, far * length, workers)
        _set(params, w)
        return f

    def _local(
        self, params: list[Tensor], w: Tensor, closure: Closure, loss: float, off: Tensor, g: Tensor, most: float
    ) -> tuple[Tensor, float]:
        """A worker's step from w, and how far its F fell: `F(u) = f_i(u) + <off, u - w>`, of gradient g at w."""
        s, value, gradient, radius = torch.zeros_like(w), loss, g, most
        for _ in range(self.param_groups[0]["local_steps"]):
            length = torch.linalg.vector_norm(gradient)
            if float(length) == 0:
                break
            trial = s - gradient * (radius / length)
            trial = trial * min(1.0, most / float(torch.linalg.vector_norm(trial).clamp_min(1e-30)))
            promised = -float(gradient @ (trial - s))
            if promised <= 0:
                break
            found, new = self._evaluate(params, w + trial, closure)
            found, new = found + float(off @ trial), new + off
            ratio = (value - found) / promised
            if ratio > self.LOCAL.low:
                s, value, gradient = trial, found, new
            radius = _follow(radius, ratio, self.LOCAL, most)
        return s, loss - value

    def _tried(
        self,
        params: list[Tensor],
        closures: Sequence[Closure],
        w: Tensor,
        s: Tensor,
        f: float,
        promised: float,
        workers: int,
    ) -> tuple[Tensor, float]:
        """w + s and f there, where f falls as was promised, else w and f; the radius follows."""
        region, ratio, there = self.param_groups[0], 0.0, f
        if promised >= region["tolerance"]:
            with torch.no_grad():
                _set(params, w + s)
                there = self._mean([float(closure()) for closure in closures], workers, w)
            ratio = (f - there) / promised
        radius = _follow(region["radius"], ratio, self.GLOBAL, region["max_radius"])
        region["radius"] = max(radius, region["min_radius"])
        return (w + s, there) if ratio >= self.GLOBAL.low else (w, f)

    def _evaluate(self, params: list[Tensor], at: Tensor, closure: Closure) -> tuple[float, Tensor]:
        """A worker's loss and its gradient, as one vector."""
        _set(params, at)
        loss = closure()
        found = torch.autograd.grad(loss, params, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        return float(loss.detach()), parameters_to_vector(whole)

    def _summed(self, t: Tensor) -> Tensor:
        if self.process_group is not None:
            dist.all_reduce(t, group=self.process_group)
        return t

    def _mean(self, losses: list[float], workers: int, like: Tensor) -> float:
        return float(self._summed(like.new_tensor(sum(losses), dtype=torch.float64))) / workers


def _follow(radius: float, ratio: float, rule: Judgement, most: float) -> float:
    if not ratio >= rule.low:  # nor where it is no number
        return radius * rule.shrink
    return min(radius * rule.grow, most) if ratio > rule.high else radius


@torch.no_grad()
def _set(params: list[Tensor], values: Tensor) -> None:
    first = 0
    for p in params:  # in place: `vector_to_parameters` would let them share one tensor
        p.copy_(values[first : first + p.numel()].view_as(p))
        first += p.numel()
