"""ALLoRA: AdamW whose step for a row is the larger, the shorter the row still is.

    c_i = 1 / √(|P_i| + 1 / η²),   P_i ← (1 - lr wd) P_i - lr c_i U_i      U: AdamW's, or of gradients c_i G_i

for rows P_i of B (out, r), which begin at zero and go η times as fast at first. It is meant for LoRA without dropout
and without scaling (alpha = r). Adam forgets a factor on its gradients, so that `mode="grad"`, as the paper has it,
changes little beside it; "update" is the default. The norm under the root is not squared.

Paper: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024, arXiv 2410.09692. Which factor has these
rates, and η, are not settled by what we read of it: B's rows and 2 here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from isotune.optim.adamw import adamw_direction
from isotune.optim.batched import BatchedOptimizer, Group, Params, State


class ALLoRA(BatchedOptimizer):
    """AdamW with a rate of its own for each row; `isotune.parameter_groups(model, algorithm="allora")` finds B.

    Args:
        params: Parameters, or groups of them; a group with `algorithm="adamw"` is stepped by AdamW alone.
        lr: The learning rate.
        betas: Of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decoupled; rows have no rates of their own in it.
        eta: η, the factor on the rate of a row of zeros.
        mode: Whether the factor is on the "update" or on the "grad" that it is made of.
    """

    algorithm: ClassVar[str] = "allora"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eta: float = 2.0,
        mode: Literal["update", "grad"] = "update",
    ) -> None:
        if eta <= 0 or mode not in ("update", "grad"):
            raise ValueError(f"eta is above 0 and mode 'update' or 'grad'; found {eta} and {mode!r}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "eta": eta,
            "mode": mode,
        }
        super().__init__(params, defaults)

    def takes(self, p: Tensor) -> bool:
        return p.dim() > 1

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        c = row_rates(self.stacked(batch, group), group["eta"]).to(G.dtype)
        late = group["mode"] == "update"
        U = adamw_direction(G if late else c * G, state, group["betas"], group["eps"])
        return c * U if late else U


def row_rates(P: Tensor, eta: float) -> Tensor:
    """c (..., m, 1) of the rows of P (..., m, n): η for a row of zeros, and less for all others."""
    norms = torch.linalg.vector_norm(P.to(torch.promote_types(P.dtype, torch.float32)), dim=-1, keepdim=True)
    return (norms + eta**-2).rsqrt()
