"""Scion: steps to the border of a norm's ball, a norm for each kind of layer.

    d ← (1 - α) d + α G;   W ← (1 - lr) W - lr ρ u(d)   (Frank and Wolfe), or   W ← W - lr ρ u(d)   (unconstrained)

    spectral     √(m / n) orthogonalize(d); of kernels k x k over k²       bias_rms     d / rms(d)
    sign         sign(d) / n, for what comes out: heads, tied embeddings   column       columns over their rms, over n
    row          rows over √n times their length

The first is for hidden layers, and every u depends on d's direction alone. `ScionLight` keeps no state: gradients are
not set to zero, and each step takes its share of what has gathered in them.

Paper: "Training Deep Learning Models with Norm-Constrained LMOs", ICML 2025, arXiv 2502.07529.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from isotune.optim.batched import Group, Params, State
from isotune.optim.matrix import MatrixOptimizer, adjustment, iteration
from isotune.optim.orthogonalize import Method

Norm = Literal["auto", "spectral", "sign", "column", "row", "bias_rms"]


class Scion(MatrixOptimizer):
    """Steps of a fixed size in a norm for each kind of layer; by group, `norm` and `scale` say which and how far.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, in (0, 1] where constrained.
        momentum: α, the weight of the newest gradient: 0.1 stands where others say a momentum of 0.9.
        norm: "spectral", "sign", "column", "row" or "bias_rms"; "auto" is spectral for matrices, else bias_rms.
        scale: ρ, the radius.
        unconstrained: Whether to leave out the way towards the ball's middle; what is pretrained wants that.
        method: See `Muon`.
        ns_steps: See `Muon`.
        ns_dtype: See `Muon`.
    """

    algorithm: ClassVar[str] = "scion"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.1,
        norm: Norm = "auto",
        scale: float = 1.0,
        unconstrained: bool = False,
        method: Method = "newton-schulz",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(
                f"momentum is {momentum}; here it is the weight of the newest gradient, above 0 and up to 1"
            )
        defaults = {"lr": lr, "momentum": momentum, "norm": norm, "scale": scale, "unconstrained": unconstrained}
        super().__init__(params, defaults | {"weight_decay": 0.0} | iteration(method, ns_steps, ns_dtype, None))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        norm = param_group.get("norm", self.defaults["norm"])
        if norm not in get_args(Norm):
            raise ValueError(f"norm is {norm!r}; it is one of {', '.join(get_args(Norm))}")
        super().add_param_group(param_group)

    def takes(self, p: Tensor) -> bool:
        return True

    def shrinks(self, group: Group) -> float:
        return 0.0 if group["unconstrained"] else float(group["lr"])

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        d = state["momentum_buffer"].lerp_(G, group["momentum"])
        return self.normalised(d, batch[0], group)

    def normalised(self, d: Tensor, p: Tensor, group: Group) -> Tensor:
        """ρ u(d), of momenta stacked along dim 0, for parameters such as p."""
        norm = group["norm"]
        if norm == "auto":
            norm = "bias_rms" if d.dim() < 3 else "spectral"
        if norm == "spectral":
            window = math.prod(p.shape[2:]) if group["part"] == "matrix" else 1
            m, n = d.shape[-2:]
            return self.orthogonal(d, group) * (group["scale"] * adjustment((m, n // window), "spectral") / window)
        return group["scale"] * NORMALISERS[norm](d)


def _over(d: Tensor, length: Tensor) -> Tensor:
    return d / (length + 1e-8 * (length == 0))


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda d: d.sign() / d.shape[-1],
    "column": lambda d: _over(d, d.square().mean(dim=-2, keepdim=True).sqrt()) / d.shape[-1],
    "row": lambda d: _over(d, torch.linalg.vector_norm(d, dim=-1, keepdim=True)) / math.sqrt(d.shape[-1]),
    "bias_rms": lambda d: _over(d, d.reshape(len(d), -1).square().mean(1).sqrt().view(-1, *[1] * (d.dim() - 1))),
}
"""u(d) of momenta stacked along dim 0, beside the spectral one."""


class ScionLight(Scion):
    """Scion without a state: the gradient itself is the momentum, and each step leaves `1 - momentum` of it.

    Never set the gradients to zero, clip them, or accumulate them over batches: they are what it remembers. The
    arguments are Scion's.
    """

    algorithm: ClassVar[str] = "scion_light"

    def fresh(self, G: Tensor, group: Group) -> State:
        return {}

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        return self.normalised(G, batch[0], group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after which the gradients are what is remembered of them."""
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(1 - group["momentum"])
        return loss
