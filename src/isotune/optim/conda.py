"""Conda: Adam in the basis of the momentum's singular vectors.

    M ← β₁ M + (1 - β₁) G;   Q: every T steps the singular vectors of M on its shorter side (n x n where m ≥ n)
    v ← β₂ v + (1 - β₂) (G Q)²,   W ← (1 - lr wd) W - lr scale √(1 - β₂ᵗ) / (1 - β₁ᵗ) (M Q / (√v + ε)) Qᵀ

and with Qᵀ on the left where m < n. The second moment is not turned when the basis changes. With Q = I it is Adam.
The state is Adam's and one square basis of the shorter side, a tensor like the rest.

Paper: "Conda: Column-Normalized Adam for Training Large Language Models Faster", 2025, arXiv 2509.24218.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from isotune.optim.adamw import adamw_state, bias_corrections
from isotune.optim.batched import Group, Params, State
from isotune.optim.matrix import MatrixOptimizer


class Conda(MatrixOptimizer):
    """Adam in the basis of the momentum's singular vectors.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate; the authors train language models from the start with 0.01.
        betas: Of the two moments.
        eps: Added to the root of the second, before its bias is corrected.
        weight_decay: Decoupled.
        scale: A factor on the step, not on the decay.
        update_proj_gap: T, the steps between two bases; the first is that of the first gradient.
    """

    algorithm: ClassVar[str] = "conda"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 0.25,
        update_proj_gap: int = 2000,
    ) -> None:
        if update_proj_gap < 1:
            raise ValueError(f"update_proj_gap is {update_proj_gap}; it is 1 or more steps")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "scale": scale}
        super().__init__(params, defaults | {"update_proj_gap": update_proj_gap})

    def fresh(self, G: Tensor, group: Group) -> State:
        short = min(G.shape[-2:])
        return adamw_state(G) | {
            "basis": torch.eye(short, dtype=G.dtype, device=G.device).expand(*G.shape[:-2], -1, -1)
        }

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        M, V, Q, step = (state[name] for name in ("exp_avg", "exp_avg_sq", "basis", "step"))
        first, second = group["betas"]
        M.lerp_(G, 1 - first)
        due = step % group["update_proj_gap"] == 0
        if bool(due.any()):
            Q[due] = _basis(M[due])
        step.add_(1)
        high = G.shape[-2] >= G.shape[-1]
        turned = (lambda X: X @ Q) if high else (lambda X: Q.mT @ X)
        V.mul_(second).add_(turned(G).square(), alpha=1 - second)
        one, two = bias_corrections(step, group["betas"], G)
        U = turned(M) / (V.sqrt() + group["eps"]) * (two.sqrt() / one * group["scale"])
        return U @ Q.mT if high else Q @ U


def _basis(M: Tensor) -> Tensor:
    """The singular vectors of M (..., m, n) on its shorter side, as columns."""
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return Vh.mT if M.shape[-2] >= M.shape[-1] else U
