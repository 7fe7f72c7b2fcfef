"""NorMuon: Muon, with the rows of its step brought to one length over time.

    Q = orthogonalize(B)  as in Muon,   v ← β₂ v + (1 - β₂) mean_j Q_ij²  (one number a row),
    N = Q / √v,   W ← (1 - lr wd) W - lr s(m, n) N |Q|_F / |N|_F

so that the step is as long as Muon's. Rows of an orthogonal matrix that is not high have length 1 already: it is on
high matrices, and over time, that the two differ. The state is Muon's and one number a row.

Paper: "NorMuon: Making Muon more efficient and scalable", 2025, arXiv 2510.05491. As in the authors' code the step
keeps Muon's length; kernels of convolutions are seen as (out, rest), which that code does not do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from isotune.optim.batched import Group, Params, State
from isotune.optim.matrix import Adjustment, MatrixOptimizer, iteration, momentum
from isotune.optim.orthogonalize import Method, Polynomial


class NorMuon(MatrixOptimizer):
    """Muon whose rows are normalised by a running mean of their squares; arguments are Muon's, but for `beta2`.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, times `adjust_lr_fn`'s factor for the shape.
        weight_decay: Decoupled, at the bare rate.
        momentum: μ.
        beta2: Of the running mean, below 1.
        nesterov: Whether to look ahead.
        ns_coefficients: See `Muon`, as for all that follow.
        ns_steps: See `Muon`.
        adjust_lr_fn: See `Muon`.
        method: See `Muon`.
        ns_dtype: See `Muon`.
        process_group: See `Muon`.
    """

    algorithm: ClassVar[str] = "normuon"

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Polynomial | None = None,
        ns_steps: int = 5,
        adjust_lr_fn: Adjustment | None = None,
        method: Method = "newton-schulz",
        ns_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 is {beta2}; it lies between 0 and 1")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
        }
        defaults |= {"adjust_lr_fn": adjust_lr_fn} | iteration(method, ns_steps, ns_dtype, ns_coefficients)
        super().__init__(params, defaults, process_group)

    def fresh(self, G: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(G), "row_squares": torch.zeros_like(G[..., :1])}

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        B = momentum(G, state["momentum_buffer"], group["momentum"], group["nesterov"])
        Q = self.orthogonal(B, group)
        n, squares = Q.shape[-1], torch.linalg.vector_norm(Q, dim=-1, keepdim=True).square()
        v = state["row_squares"].lerp_(squares / n, 1 - group["beta2"])
        # The running mean lacks its bias correction: what it is too small by is the same in all rows, and cancels.
        c = 1 / (v.sqrt() + 1e-10)
        long, longer = (
            squares.sum(dim=-2, keepdim=True).sqrt(),
            (squares * c.square()).sum(dim=-2, keepdim=True).sqrt(),
        )
        return Q.mul_(c * (long / (longer + 1e-10)))
