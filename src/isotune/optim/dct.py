"""The few cosines that hold most of a matrix: a low-rank basis that costs no decomposition and no memory.

Of a matrix as high as wide, or higher, the rows are expanded in the orthonormal DCT-II, `S = M Cᵀ`; the r columns
with the largest norms are kept, `g = S_I`, which stand for `M ≈ g C_I`. A wide matrix is transposed first. Because C
is orthogonal, `|M - g C_I|² = |M|² - |g|²`, and the choice by the 2-norm is the best one. On smooth gradients the
DCT-II keeps more than the DCT-III, which the authors use on one side.

Paper: "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", 2025, arXiv 2505.17967.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from isotune.linalg.dct import dct, dct_matrix, idct

_SHORT = 512
"""Up to so many cosines products with them all cost less than Fourier transforms."""


def expanded(M: Tensor) -> Tensor:
    """S (..., long, short): M (..., m, n), transposed where it is wide, in cosines along its shorter side."""
    M = M if M.shape[-2] >= M.shape[-1] else M.mT
    return M @ _cosines(M).mT if M.shape[-1] <= _SHORT else dct(M.contiguous())


def chosen(S: Tensor, rank: int, norm: float = 1.0) -> Tensor:
    """The indices (..., r), in order, of the columns of S with the largest norms."""
    scores = torch.linalg.vector_norm(S, ord=norm, dim=-2)
    return scores.topk(min(rank, S.shape[-1]), dim=-1).indices.sort(dim=-1).values


def taken(S: Tensor, columns: Tensor) -> Tensor:
    """g (..., long, r): those columns of S."""
    return S.gather(-1, columns.unsqueeze(-2).expand(*S.shape[:-1], -1))


def put_back(g: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """`g C_I`, as the matrix (..., m, n) that g (..., long, r) was taken from."""
    m, n = shape[-2:]
    if min(m, n) <= _SHORT:
        M = g @ _cosines(g, min(m, n))[columns]
    else:
        S = g.new_zeros(*shape[:-2], max(m, n), min(m, n))
        M = idct(S.scatter_(-1, columns.unsqueeze(-2).expand(g.shape), g))
    return M if m >= n else M.mT


def _cosines(like: Tensor, short: int | None = None) -> Tensor:
    """C for rows of so many numbers, by default as many as those of `like`."""
    return _matrix(short or like.shape[-1], like.dtype, like.device)


@lru_cache(maxsize=64)
def _matrix(short: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return dct_matrix(short).to(device, dtype)
