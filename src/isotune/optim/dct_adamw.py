"""DCT-AdamW: AdamW on the few cosines that hold most of each gradient.

    A = G (+ E);   a = A in r cosines of its shorter side (see `isotune.optim.dct`);   E = A - back(a)
    m, v: Adam's moments of a;   W ← (1 - lr wd) W - lr back(m̂ / (√v̂ + ε))

When the choice of cosines changes, the moments of those that stay are kept and those of new ones begin at zero: from
one orthogonal basis, that is what turning the moments into the new subspace amounts to. The state is 2 r numbers for
each of the longer side, and with error feedback (E) one matrix more, in full precision.

Paper: "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", 2025, arXiv 2505.17967.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from isotune.optim.adamw import bias_corrections
from isotune.optim.batched import Group, Params, State
from isotune.optim.dct import chosen, expanded, put_back, taken
from isotune.optim.matrix import MatrixOptimizer


class DCTAdamW(MatrixOptimizer):
    """AdamW in a low-rank subspace of cosines that is chosen anew at every step.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate.
        rank: r, how many cosines are kept; all where a side has fewer.
        betas: Of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decoupled.
        norm: By which columns are chosen: 1 as the authors do, or 2, the best.
        update_proj_gap: Steps between two choices.
        error_feedback: Whether what a step leaves out is added to the next gradient.
    """

    algorithm: ClassVar[str] = "dct_adamw"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        rank: int = 128,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        norm: float = 1.0,
        update_proj_gap: int = 1,
        error_feedback: bool = False,
    ) -> None:
        for name, value in (("rank", rank), ("update_proj_gap", update_proj_gap)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it is 1 or more")
        defaults = {"lr": lr, "rank": rank, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"norm": norm, "update_proj_gap": update_proj_gap, "error_feedback": error_feedback}
        super().__init__(params, defaults)

    def fresh(self, G: Tensor, group: Group) -> State:
        short, long = sorted(G.shape[-2:])
        rank = min(group["rank"], short)
        moment = G.new_zeros(*G.shape[:-2], long, rank)
        columns = torch.arange(rank, device=G.device).expand(*G.shape[:-2], -1)
        state = {"step": G.new_zeros(()), "columns": columns, "exp_avg": moment, "exp_avg_sq": moment.clone()}
        return state | ({"error": torch.zeros_like(G)} if group["error_feedback"] else {})

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        A = G + state["error"] if group["error_feedback"] else G
        S, columns = expanded(A), state["columns"]
        due = state["step"] % group["update_proj_gap"] == 0
        if bool(due.any()):
            before = columns.clone()
            columns[due] = chosen(S[due], group["rank"], group["norm"])
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(_kept(state[name], before, columns))
        a = taken(S, columns)
        if group["error_feedback"]:
            state["error"].copy_(A - put_back(a, columns, A.shape))
        first, second = group["betas"]
        state["step"].add_(1)
        state["exp_avg"].lerp_(a, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(a, a, value=1 - second)
        one, two = bias_corrections(state["step"], group["betas"], a)
        u = state["exp_avg"] / one / (state["exp_avg_sq"].sqrt() / two.sqrt() + group["eps"])
        return put_back(u, columns, G.shape)


def _kept(moment: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """A moment (..., long, r) of the columns `before`, for the columns `now`: zero for those that are new."""
    same = (before.unsqueeze(-1) == now.unsqueeze(-2)).to(moment.dtype)  # (..., r, r), a one for each that stays
    return moment @ same
