"""AdamW's step on stacked parameters: for what other optimizers leave, and what some of them are built on.

    m ← β₁ m + (1 - β₁) G,   v ← β₂ v + (1 - β₂) G²,   U = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

Paper: "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101. The same numbers as `torch.optim.AdamW`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_state(G: Tensor) -> dict[str, Tensor]:
    """Two moments of the shape of G, and how many steps were taken."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=G.device),
        "exp_avg": torch.zeros_like(G),
        "exp_avg_sq": torch.zeros_like(G),
    }


def adamw_direction(G: Tensor, state: dict[str, Tensor], betas: tuple[float, float], eps: float) -> Tensor:
    """What AdamW subtracts, times the learning rate, of gradients stacked along dim 0; the state changes in place."""
    first, second = betas
    state["step"].add_(1)
    state["exp_avg"].lerp_(G, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(G, G, value=1 - second)
    one, two = bias_corrections(state["step"], betas, G)
    return state["exp_avg"] / one / (state["exp_avg_sq"].sqrt() / two.sqrt() + eps)


def bias_corrections(step: Tensor, betas: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """`1 - β₁ᵗ` and `1 - β₂ᵗ` for the steps t (k), of a shape to divide `like` (k, ...) by."""
    t = step.double().view(-1, *[1] * (like.dim() - 1))
    one, two = (1 - beta**t for beta in betas)
    return one.to(like.dtype), two.to(like.dtype)
