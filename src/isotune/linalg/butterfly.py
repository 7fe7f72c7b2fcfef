"""Block-diagonal and butterfly products, applied to rows by reshaping; no d x d matrix is formed.

    v blockdiag(R_1, ..., R_D)                          every run of b coordinates is rotated by its own b x b block
    v B_m ... B_1,   B_i = P_i blockdiag(...) P_iᵀ      factors whose blocks join ever more distant coordinates

P_i parts the coordinates in groups of b 2^(i-1) and those in halves of a block, b / 2 each: a block of B_i takes the
k-th half and the one 2^(i-1) halves further on. B_1 is block-diagonal; with m = log2(D) + 1 factors the product is
dense. Source: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024.
Cost for n rows: 2 n d b flops a factor, or 2 n d b 2^(k-1) for k factors at once. Letters: d the dimension, b the
size of a block, D = d / b, m factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.linalg.thin import without_autocast

_WIDE = 64


def rotate_blocks(v: Tensor, R: Tensor) -> Tensor:
    """`v blockdiag(R)` for rows v (..., d) and blocks R (D, b, b), or (1, b, b) for one block that all share."""
    D, b, _ = R.shape
    R = R.to(v.dtype)
    with without_autocast(v):
        if D == 1:
            return (v.reshape(-1, b) @ R[0]).view(v.shape)
        return torch.bmm(v.reshape(-1, D, b).transpose(0, 1), R).transpose(0, 1).reshape(v.shape)


def rotate_butterfly(v: Tensor, R: Tensor, transpose: bool = False) -> Tensor:
    """`v B_m ... B_1`, or `v (B_m ... B_1)ᵀ`, for rows v (..., d) and the blocks R (m, D, b, b) of B_1 to B_m.

    Every factor is a pass over memory. The first k of them together are block-diagonal with blocks of b 2^(k-1);
    for many rows these are computed first and applied at once, as long as they are no wider than 64.
    """
    m, D, b, _ = R.shape
    near = max(1, sum(b * 2**k <= _WIDE for k in range(m)))
    wide = b * 2 ** (near - 1)
    if near == 1 or v.numel() <= wide * D * b:
        return _by_factors(v, R, 0, transpose)
    rows = torch.eye(wide, dtype=R.dtype, device=R.device).repeat(1, D * b // wide)
    blocks = _by_factors(rows, R[:near], 0).view(wide, -1, wide).transpose(0, 1)
    if transpose:
        return _by_factors(rotate_blocks(v, blocks.mT), R[near:], near, transpose)
    return rotate_blocks(_by_factors(v, R[near:], near), blocks)


def _by_factors(v: Tensor, R: Tensor, level: int, transpose: bool = False) -> Tensor:
    """The product with the factors whose blocks are R (k, D, b, b), the first of which is B_(level + 1)."""
    factors = list(enumerate(R.mT if transpose else R, start=level))
    for i, blocks in factors if transpose else reversed(factors):
        v = rotate_blocks(v, blocks) if i == 0 else _rotate_distant(v, blocks, 2**i)
    return v


def _rotate_distant(v: Tensor, R: Tensor, apart: int) -> Tensor:
    """`v P blockdiag(R) Pᵀ`, where a block takes two halves that stand `apart` halves from each other."""
    D, b, _ = R.shape
    split = v.reshape(
        -1, D // apart, 2, apart, b // 2
    )  # rows, group, half of a block, block in the group, coordinate
    rows = split.permute(1, 3, 0, 2, 4).reshape(D, -1, b)
    with without_autocast(v):
        turned = torch.bmm(rows, R.to(v.dtype)).view(D // apart, apart, -1, 2, b // 2)
    return turned.permute(2, 0, 3, 1, 4).reshape(v.shape)


def drop_blocks(R: Tensor, share: float) -> Tensor:
    """R (D, b, b) with `int(share D)` blocks, chosen by torch's global generator, replaced by the identity."""
    D, b, _ = R.shape
    dropped = torch.randperm(D, device=R.device) < int(share * D)
    return torch.where(dropped[:, None, None], torch.eye(b, dtype=R.dtype, device=R.device), R)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, the smaller of two."""
    return min((k for k in range(1, n + 1) if n % k == 0), key=lambda k: (abs(k - wanted), k))
