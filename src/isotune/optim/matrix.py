"""The optimizers that step a matrix as one thing, in the directions of its singular vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from isotune.optim.batched import BatchedOptimizer, Group, Params, State
from isotune.optim.orthogonalize import Method, Polynomial, orthogonalize

Adjustment = Literal["original", "match_rms_adamw", "spectral", "rms"]


def adjustment(shape: Sequence[int], how: Adjustment | None) -> float:
    """The factor on the learning rate of an orthogonal step for matrices of the shape (..., m, n).

    original, and None: `√max(1, m / n)`. match_rms_adamw: `0.2 √max(m, n)`, which makes its numbers as large (root
    mean square 0.2) as AdamW's are in long runs. rms: `√max(m, n)`, as large as AdamW's first ones. spectral:
    `√(m / n)`, with which outputs change as much whatever the widths.
    """
    m, n = shape[-2:]
    if how in (None, "original"):
        return math.sqrt(max(1.0, m / n))
    if how == "spectral":
        return math.sqrt(m / n)
    return (0.2 if how == "match_rms_adamw" else 1.0) * math.sqrt(max(m, n))


class MatrixOptimizer(BatchedOptimizer):
    """Steps matrices by what `orthogonalize` makes of them; vectors, and groups that ask for it, go to AdamW."""

    process_group: dist.ProcessGroup | None = None

    def __init__(
        self, params: Params, defaults: dict[str, Any], process_group: dist.ProcessGroup | None = None
    ) -> None:
        how, method = defaults.get("adjust_lr_fn"), defaults.get("method", "newton-schulz")
        if how is not None and how not in get_args(Adjustment):
            raise ValueError(f"adjust_lr_fn is {how!r}; it is one of {', '.join(get_args(Adjustment))}")
        if method not in get_args(Method):
            raise ValueError(f"method is {method!r}; it is one of {', '.join(get_args(Method))}")
        self.process_group = process_group
        super().__init__(params, defaults)

    def takes(self, p: Tensor) -> bool:
        return p.dim() > 1

    def fresh(self, G: Tensor, group: Group) -> State:
        return {"momentum_buffer": torch.zeros_like(G)}

    def factor(self, shape: torch.Size, group: Group) -> float:
        return adjustment(shape, group["adjust_lr_fn"]) if "adjust_lr_fn" in group else 1.0

    def orthogonal(self, B: Tensor, group: Group) -> Tensor:
        """B (..., m, n) with singular values near 1, each process with a `process_group` doing its share."""

        def own(part: Tensor) -> Tensor:
            return orthogonalize(
                part, group["method"], group["ns_steps"], group["ns_dtype"], group["ns_coefficients"]
            )

        return own(B) if self.process_group is None else _each_its_share(B, own, self.process_group)


def iteration(
    method: Method, ns_steps: int, ns_dtype: torch.dtype | None, ns_coefficients: Polynomial | None
) -> dict[str, Any]:
    """How `orthogonal` is to compute, for a group."""
    return {"method": method, "ns_steps": ns_steps, "ns_dtype": ns_dtype, "ns_coefficients": ns_coefficients}


def momentum(G: Tensor, M: Tensor, mu: float, nesterov: bool) -> Tensor:
    """`M ← μ M + (1 - μ) G`, in place, and M, or `μ M + (1 - μ) G` once more, in G's place."""
    M.lerp_(G, 1 - mu)
    return G.lerp_(M, mu) if nesterov else M


def _each_its_share(B: Tensor, compute: Any, group: dist.ProcessGroup) -> Tensor:
    """`compute(B)` of matrices (..., m, n), of which each process computes some and gets the rest."""
    flat, world = B.flatten(0, -3), dist.get_world_size(group)
    share = -(-len(flat) // world)
    padded = flat.new_zeros(share * world, *flat.shape[1:])
    padded[: len(flat)] = flat
    rank = dist.get_rank(group)
    own = compute(padded[rank * share : (rank + 1) * share]).contiguous()
    dist.all_gather(list(padded.chunk(world)), own, group=group)
    return padded[: len(flat)].view(B.shape)
