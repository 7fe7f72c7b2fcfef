"""AdaRem: SGD that goes faster where a gradient agrees with where the parameter has been going, and slower else.

    b = sign(G) M / max|M|,   W ← W - lr ((1 + λᵗ b) G + wd W),   M ← β M + (1 - β) G;   M = 0 at first

so that the first step, and all late ones, are plain SGD's: λᵗ anneals the effect. The weight decay is part of the
gradient, as in SGD. A step is as large as the gradient, and needs SGD's learning rates.

Paper: "Adaptive Gradient Method with Resilience and Momentum", 2020, arXiv 2010.11041; written from its equations and
one public implementation of them. The constants are that implementation's, for ImageNet in large batches.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from isotune.optim.batched import BatchedOptimizer, Group, Params, State


class AdaRem(BatchedOptimizer):
    """SGD with a factor between 1 - λᵗ and 1 + λᵗ for each number.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, of SGD's size.
        beta: Of the running mean of gradients.
        decay: λ; 0 is SGD.
        weight_decay: Added to the gradient, times the parameter.
    """

    algorithm: ClassVar[str] = "adarem"

    def __init__(
        self, params: Params, lr: float = 0.1, beta: float = 0.9, decay: float = 0.999, weight_decay: float = 0.0
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it lies between 0 and 1")
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay, "weight_decay": weight_decay})

    def shrinks(self, group: Group) -> float:
        return 0.0

    def fresh(self, G: Tensor, group: Group) -> State:
        return {"step": torch.zeros((), device=G.device), "exp_avg": torch.zeros_like(G)}

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        M, step = state["exp_avg"], state["step"]
        step.add_(1)
        largest = torch.linalg.vector_norm(M.flatten(1) if M.dim() > 1 else M[:, None], torch.inf, dim=1)
        largest = largest.view(-1, *[1] * (M.dim() - 1))
        share = (group["decay"] ** step.double()).to(G.dtype).view(-1, *[1] * (G.dim() - 1))
        U = G * (1 + share * G.sign() * M / largest.clamp_min(torch.finfo(M.dtype).tiny))
        M.lerp_(G, 1 - group["beta"])
        return U + group["weight_decay"] * self.stacked(batch, group)
