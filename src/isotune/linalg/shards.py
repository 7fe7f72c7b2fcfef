"""Vectors cut into shards of r numbers, and matrices whose blocks change alike.

shard sum        x -> Σ_j x_[j]                      (in) -> (r); zeros fill the last shard
shard columns    [I_r I_r ...], cut off at in        (r x in): the matrix of the shard sum
block affine     W'_pq = W_pq (I + B_p) + B_p        for blocks W_pq (r x r) of W (out x in)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shard_sum(x: Tensor, r: int) -> Tensor:
    """The sum (..., r) of the shards of the rows x (..., in)."""
    return F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)


def shard_columns(r: int, n_in: int, like: Tensor) -> Tensor:
    """A (r, n_in) with `x Aᵀ = shard_sum(x, r)`, of the dtype and device of `like`."""
    return torch.eye(r, dtype=like.dtype, device=like.device).repeat(1, -(-n_in // r))[:, :n_in]


def block_affine(W: Tensor, B: Tensor) -> Tensor:
    """W' (out, in) for W (out, in) and B (out / r, r, r), of one dtype; r divides in. Cost: 2 out in r flops."""
    blocks, r, _ = B.shape
    rows = W.reshape(blocks, -1, r)  # of the blocks W_pq of each p, one under the other
    changed = torch.baddbmm(rows, rows, B).view(blocks, r, -1, r)
    return (changed + B[:, :, None]).view(W.shape)


def block_affine_rows(x: Tensor, W: Tensor, B: Tensor) -> Tensor:
    """`x W'ᵀ` (n, out) for rows x (n, in), without W': 4 n out in flops, cheaper for fewer rows than r."""
    blocks, r, _ = B.shape
    shards = x.reshape(1, -1, r)
    turned = (shards + shards @ B.mT).view(blocks, *x.shape)  # (I + B_p) x_q, for every p
    y = turned @ W.reshape(blocks, r, -1).mT + shard_sum(x, r) @ B.mT
    return y.movedim(0, 1).flatten(1)
