"""ODELoRA: LoRA's factors moved as gradient descent on the whole weight would move their product.

    d(B A)/dt = -(P_B G + G P_A - P_B G P_A),   P_B = B S_B⁻¹ Bᵀ,  P_A = Aᵀ S_A⁻¹ A,  S_B = Bᵀ B,  S_A = A Aᵀ

the projection of -G on what a matrix of rank r can do, while `S_B = S_A` is kept. From the factors' gradients
`g_B = s G Aᵀ` and `g_A = s Bᵀ G` alone, with `M = Bᵀ g_B / s`:

    dB = -(g_B / s - B S_B⁻¹ M / 2) S_A⁻¹ / s + B K / s,   dA = -S_B⁻¹ (g_A / s - M S_A⁻¹ A / 2) / s - K A / s

K (r x r, symmetric) keeps the balance. Steps are Euler's, Heun's, or of the fourth order (RK4); the last two evaluate
the same batch anew and need a closure. `S` is damped by a share of its mean, for it is singular at B = 0, and in
Euler's steps by as much as a step moves the product, without which small factors would be thrown far: `b - h g / 2b`
with b² below h g. G is never formed; the cost is O((in + out) r² + r³). There is no momentum and no Adam: rates are
those of plain gradient descent.

Paper: "ODELoRA: Training Low-Rank Adaptation by Solving Ordinary Differential Equations", 2026, arXiv 2602.07479; the
equations are derived from what its abstract says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from isotune.optim.batched import ADAMW, BatchedOptimizer, Group, Params, as_sharded, gradient_of, whole

Integrator = Literal["euler", "heun", "rk4"]
_STAGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "euler": ((), (1.0,)),
    "heun": ((1.0,), (0.5, 0.5)),
    "rk4": ((0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
"""How far along the last velocity the next is taken, and what each of them counts."""


class ODELoRA(BatchedOptimizer):
    """Balanced gradient flow of the products B A. A group has A (r, in) and B (out, r) of a pair after each other.

    `isotune.parameter_groups(model, algorithm="odelora")` makes such groups, with `scale`, the factor s of s B A.

    Args:
        params: Groups of parameters, in pairs; a group with `algorithm="adamw"` is stepped by AdamW.
        lr: The step h of the integration: the learning rate of gradient descent on the whole weight.
        weight_decay: By which the products shrink, times h.
        integrator: "euler", "heun" or "rk4": one, two or four gradients a step.
        damping: Added to the diagonals of S, as a share of the mean of S_A's; 0 for no damping at all.
        rebalance_every: Steps after which the factors are balanced anew, their product unchanged; 0 for never. Where
            the product has not the full rank, as at the start, they stay as they are.
        scale: s.
    """

    algorithm: ClassVar[str] = "odelora"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        integrator: Integrator = "euler",
        damping: float = 1e-4,
        rebalance_every: int = 1,
        scale: float = 1.0,
    ) -> None:
        if integrator not in _STAGES:
            raise ValueError(f"integrator is {integrator!r}; it is one of {', '.join(_STAGES)}")
        self.integrator = integrator
        defaults = {"lr": lr, "weight_decay": weight_decay, "damping": damping, "rebalance_every": rebalance_every}
        super().__init__(params, defaults | {"scale": scale, "steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["algorithm"] != ADAMW:
            shapes = [tuple(p.shape) for p in group["params"]]
            pairs = list(zip(shapes[::2], shapes[1::2], strict=False))
            if len(shapes) % 2 or not all(len(a) == len(b) == 2 and a[0] == b[1] for a, b in pairs):
                raise ValueError(f"odelora steps pairs A (r, in), B (out, r), one after the other; found {shapes}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The closure clears the gradients, computes the loss, and calls its `backward`."""
        between, weights = _STAGES[self.integrator]
        if closure is None and between:
            raise ValueError(f"{self.integrator} computes {len(weights)} gradients a step and needs a closure")

        def evaluate() -> Any:
            with torch.enable_grad():
                return closure() if closure is not None else None

        loss = evaluate()
        batches = [(group, batch) for group in self.param_groups for batch in _pairs(group)]
        start = [[whole(p).clone() for p in batch] for _, batch in batches]
        others = [p for group in self.param_groups if group["algorithm"] == ADAMW for p in group["params"]]
        first = [p.grad if p.grad is None or not between else p.grad.clone() for p in others]
        stiff = not between
        velocities = [[_velocity(batch, group, stiff) for group, batch in batches]]
        for far in between:
            self._move(batches, start, velocities[-1:], (far,))
            evaluate()
            velocities.append([_velocity(batch, group, stiff) for group, batch in batches])
        self._move(batches, start, velocities, weights)
        for group, batch in batches:
            self._finish(group, batch)
        for p, gradient in zip(others, first, strict=True):
            p.grad = gradient
        for group in self.param_groups:
            group["steps"] += 1
            if group["algorithm"] == ADAMW:
                for own, batch in self._batches(group):
                    self._step(batch, group, own)
        return loss

    def _move(self, batches: Any, start: Any, velocities: Any, weights: tuple[float, ...]) -> None:
        """Go from the start by the learning rate, times the weighted velocities."""
        for (group, batch), own, *found in zip(batches, start, *velocities, strict=True):
            for p, begin, *ways in zip(batch, own, *found, strict=True):
                way = sum(weight * w for weight, w in zip(weights, ways, strict=True))
                p.copy_(as_sharded(begin + float(group["lr"]) * way, p))

    def _finish(self, group: Group, batch: list[Tensor]) -> None:
        # Both factors shrink, so that the product does by twice as much.
        torch._foreach_mul_(batch, 1 - float(group["lr"]) * group["weight_decay"] / 2)
        every = group["rebalance_every"]
        if every and (group["steps"] + 1) % every == 0:
            A, B = (torch.stack([whole(p) for p in batch[first::2]]) for first in (0, 1))
            for first, balanced in enumerate(rebalanced(A, B)):
                for p, t in zip(batch[first::2], balanced.unbind(), strict=True):
                    p.copy_(as_sharded(t, p))


def _pairs(group: Group) -> list[list[Tensor]]:
    """Pairs of the same shapes, as A, B, A, B, ...; without those that have no gradients."""
    found: dict[Any, list[Tensor]] = {}
    if group["algorithm"] != ADAMW:
        for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
            if A.grad is not None and B.grad is not None:
                found.setdefault((A.shape, B.shape, A.dtype, A.device), []).extend([A, B])
    return list(found.values())


def _velocity(batch: list[Tensor], group: Group, stiff: bool) -> list[Tensor]:
    """In the order of the batch; damped for Euler's steps where `stiff`."""
    A, B, gA, gB = (
        torch.stack([whole(t) for t in ts])
        for ts in (batch[::2], batch[1::2], [*map(gradient_of, batch[::2])], [*map(gradient_of, batch[1::2])])
    )
    much = group["damping"] * A.square().sum((-2, -1)) / A.shape[-2]
    if stiff and group["damping"]:
        slope = _over(gB, A) + _over(gA, B)
        much = much + float(group["lr"]) / (2 * group["scale"] ** 2) * slope
    dA, dB = flow(A, B, gA, gB, group["scale"], much[:, None, None])
    return [t for pair in zip(dA.unbind(), dB.unbind(), strict=True) for t in pair]


def _over(gradient: Tensor, factor: Tensor) -> Tensor:
    """How steep the product is, seen through one factor (k, ...) from the other's gradient; 0 where that is zero."""
    length = torch.linalg.vector_norm(factor, dim=(-2, -1))
    return torch.linalg.vector_norm(gradient, dim=(-2, -1)) / length.where(length > 0, torch.inf)


def flow(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scale: float = 1.0, damping: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """dA (k, r, in) and dB (k, out, r) from the factors and their gradients, of the same shapes.

    `scale (B dA + dB A)` is minus the projection of the weight's gradient, and the balance does not change, where
    `damping`, which is added to the diagonals of S, is 0 and A and B have full rank.
    """
    exact = torch.promote_types(A.dtype, torch.float32)
    A, B, gA, gB = A.to(exact), B.to(exact), gA.to(exact) / scale, gB.to(exact) / scale
    SA, SB, M = A @ A.mT, B.mT @ B, B.mT @ gB
    eye = torch.eye(A.shape[-2], dtype=exact, device=A.device)
    much = SA.new_tensor(torch.finfo(exact).tiny ** 0.5).maximum(
        torch.as_tensor(damping, dtype=exact, device=A.device)
    )
    eye = much * eye
    inverse_A, inverse_B = torch.linalg.inv(SA + eye), torch.linalg.inv(SB + eye)
    sizes, Q = torch.linalg.eigh((SA + SB) / 2)
    K = Q @ _balancing(Q.mT @ M @ Q, sizes.clamp_min(0) + much.reshape(-1, 1)) @ Q.mT
    dB = -(gB - B @ (inverse_B @ M) / 2) @ inverse_A + B @ K
    dA = -inverse_B @ (gA - M @ (inverse_A @ A) / 2) - K @ A
    return dA / scale, dB / scale


def _balancing(M: Tensor, sizes: Tensor) -> Tensor:
    """K in the basis in which S is the diagonal of `sizes`."""
    a, b = sizes[..., :, None], sizes[..., None, :]
    return (M - M.mT) * (a - b) / (4 * a * b * (a + b))


def rebalanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (..., r, in) and B (..., out, r) of the same product, and `Bᵀ B = A Aᵀ`, diagonal. Cost: O((in + out) r²).

    Where the product has a lower rank than r they stay as they are: what one of them knows would be lost.
    """
    exact = torch.promote_types(A.dtype, torch.float32)
    QB, RB = torch.linalg.qr(B.to(exact))
    QA, RA = torch.linalg.qr(A.mT.to(exact))
    U, D, Vh = torch.linalg.svd(RB @ RA.mT)
    full = (D[..., -1] > max(A.shape[-1], B.shape[-2]) * torch.finfo(exact).eps * D[..., 0])[..., None, None]
    root = D.sqrt()
    balanced = root[..., :, None] * (QA @ Vh.mT).mT, (QB @ U) * root[..., None, :]
    return balanced[0].to(A.dtype).where(full, A), balanced[1].to(B.dtype).where(full, B)
