"""AuON and Hybrid-AuON: momentum over the root mean square of its hyperbolic cosine.

    B = Nesterov momentum as Muon's,   X = B / |B|_F,   ρ = √(mean cosh²(γ X)),   W ← (1 - lr wd) W - lr s X / ρ

What the factor does: X has N numbers whose squares sum to 1, so that `1 ≤ ρ ≤ √(1 + (cosh²γ - 1) / N)`, which is
1.0005 for 64 x 64 and 1 + 1e-6 for 1024 x 1024. AuON as in the paper is therefore momentum of a step's length 1, and
as in the authors' code (`variant="code"`, B / ρ) plain Nesterov momentum. The hybrid first takes `ns_steps` of Muon's
iteration: one in the paper, which lifts small singular values 3.4-fold, five in the code, which makes it Muon.

Paper: "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", 2025, arXiv 2509.24320 (its first draft).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from isotune.optim.batched import Group, Params, State
from isotune.optim.matrix import Adjustment, MatrixOptimizer, iteration, momentum


class AuON(MatrixOptimizer):
    """Momentum over the root mean square of its hyperbolic cosine; read above what that amounts to.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate.
        weight_decay: Decoupled.
        momentum: μ.
        gamma: γ: 1.5 in the authors' code, 1 in the paper.
        variant: "paper" gives steps of length 1, "code" steps as long as the momentum.
        ns_steps: Steps of Newton and Schulz before it: 0, or the hybrid.
        adjust_lr_fn: None, for no factor, or as `Muon`'s.
    """

    algorithm: ClassVar[str] = "auon"

    def __init__(
        self,
        params: Params,
        lr: float = 0.055,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        gamma: float = 1.5,
        variant: Literal["paper", "code"] = "paper",
        ns_steps: int = 0,
        adjust_lr_fn: Adjustment | None = None,
    ) -> None:
        if variant not in ("paper", "code"):
            raise ValueError(f"variant is {variant!r}; it is 'paper' or 'code'")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "gamma": gamma, "variant": variant}
        defaults |= {"adjust_lr_fn": adjust_lr_fn} | iteration("newton-schulz", ns_steps, None, None)
        super().__init__(params, defaults)

    def factor(self, shape: torch.Size, group: Group) -> float:
        return 1.0 if group["adjust_lr_fn"] is None else super().factor(shape, group)

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        B = momentum(G, state["momentum_buffer"], group["momentum"], nesterov=True)
        if group["ns_steps"]:
            B = self.orthogonal(B, group)
        norm = torch.linalg.vector_norm(B, dim=(-2, -1), keepdim=True)
        X = B / (norm + 1e-30)
        rho = (group["gamma"] * X).cosh().square().mean(dim=(-2, -1), keepdim=True).sqrt()
        long = B if group["variant"] == "code" or group["ns_steps"] else X
        return long / rho


class HybridAuON(AuON):
    """AuON after a step of Newton and Schulz, as in the paper; five of them are the authors' code."""

    algorithm: ClassVar[str] = "hybrid_auon"

    def __init__(self, params: Params, lr: float = 0.055, ns_steps: int = 1, **options: object) -> None:
        super().__init__(params, lr=lr, ns_steps=ns_steps, **options)  # type: ignore[arg-type]
