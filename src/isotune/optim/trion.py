"""Trion: Muon on the few cosines that hold most of the momentum.

    M ← M + G;   g = M in r cosines of its shorter side (see `isotune.optim.dct`);   M ← M - (1 - μ) back(g)
    W ← (1 - lr wd) W - lr s(m, n) back(orthogonalize(g))

What is not chosen stays in M until it is. With r the whole side it is Muon without Nesterov's look ahead. The state
is one matrix of momentum; between processes the r columns travel alone.

Paper: "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", 2025, arXiv 2505.17967.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from isotune.optim.batched import Group, Params, State
from isotune.optim.dct import chosen, expanded, put_back, taken
from isotune.optim.matrix import Adjustment, MatrixOptimizer, iteration
from isotune.optim.orthogonalize import Method, Polynomial


class Trion(MatrixOptimizer):
    """Muon in a low-rank subspace of cosines that is chosen anew at every step.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, times `adjust_lr_fn`'s factor for the whole shape.
        rank: r, how many cosines are kept; all where a side has fewer.
        weight_decay: Decoupled, at the bare rate.
        momentum: μ.
        norm: By which columns are chosen: 1 as the authors do, or 2, the best.
        ns_coefficients: See `Muon`, as for all that follow.
        ns_steps: See `Muon`.
        adjust_lr_fn: See `Muon`.
        method: See `Muon`.
        ns_dtype: See `Muon`.
        process_group: See `Muon`.
    """

    algorithm: ClassVar[str] = "trion"

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        rank: int = 128,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        norm: float = 1.0,
        ns_coefficients: Polynomial | None = None,
        ns_steps: int = 5,
        adjust_lr_fn: Adjustment | None = None,
        method: Method = "newton-schulz",
        ns_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}; it is 1 or more")
        defaults = {"lr": lr, "rank": rank, "weight_decay": weight_decay, "momentum": momentum, "norm": norm}
        defaults |= {"adjust_lr_fn": adjust_lr_fn} | iteration(method, ns_steps, ns_dtype, ns_coefficients)
        super().__init__(params, defaults, process_group)

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        M = state["momentum_buffer"].add_(G)
        S = expanded(M)
        columns = chosen(S, group["rank"], group["norm"])
        g = taken(S, columns)
        M.sub_(put_back(g, columns, M.shape), alpha=1 - group["momentum"])
        return put_back(self.orthogonal(g, group), columns, M.shape)
