"""Rotations from skew-symmetric matrices by the Cayley transform, exactly or by a Neumann series.

    R = (I + Q)(I - Q)⁻¹,   Qᵀ = -Q      (b x b): orthogonal, det 1, every rotation without the eigenvalue -1
    R ≈ (I + Q)(I + Q + ... + Q^(t-2)) = I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1),   t terms, for |Q|₂ < 1

Both have the one sign, so that the series tends to the exact form, and `-Q` gives the transpose in either. Q is given
by the b (b - 1) / 2 numbers above its diagonal, row by row. All functions work on batches, in fp32 or better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isotune.linalg.factorised import solve
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.thin import without_autocast


def above_diagonal(b: int) -> int:
    """How many numbers a skew-symmetric b x b matrix has."""
    return b * (b - 1) // 2


def skew(upper: Tensor, b: int) -> Tensor:
    """The skew-symmetric matrices (..., b, b) with `upper` (..., b (b - 1) / 2) above the diagonal, row by row."""
    flat = upper.reshape(math.prod(upper.shape[:-1]), upper.shape[-1])
    Q = flat.new_zeros(flat.shape[0], b * b).index_copy(1, _places(b, upper.device), flat).view(-1, b, b)
    return (Q - Q.mT).view(*upper.shape[:-1], b, b)


def upper_of(Q: Tensor) -> Tensor:
    """What is above the diagonals of Q (..., b, b), row by row: the inverse of `skew`."""
    return Q.flatten(-2)[..., _places(Q.shape[-1], Q.device)]


def cayley(Q: Tensor) -> Tensor:
    """`(I + Q)(I - Q)⁻¹` for skew-symmetric Q (..., b, b): orthogonal to rounding."""
    with without_autocast(Q):
        Q = at_least_fp32(Q)
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return solve(eye - Q, eye + Q)


def inverse_cayley(R: Tensor) -> Tensor:
    """Skew-symmetric Q (..., b, b) with `cayley(Q) = R`: `(R + I)⁻¹ (R - I)`, for rotations R without eigenvalue -1.

    Raises ValueError where R has that eigenvalue to within the root of the dtype's precision: Q would be infinite.
    """
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    if bool((torch.linalg.svdvals(R + eye) < 2 * torch.finfo(R.dtype).eps ** 0.5).any()):
        raise ValueError("it has the eigenvalue -1, which no Cayley transform has")
    Q = solve(R + eye, R - eye)
    return (Q - Q.mT) / 2


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """The Neumann series of `cayley`, shape (..., b, b), of three terms or more; its error is O(|Q|^(terms - 1))."""
    with without_autocast(Q):
        Q = at_least_fp32(Q)
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        series = eye + Q
        for _ in range(terms - 3):
            series = eye + Q @ series
        return series + Q @ series


def rotation(upper: Tensor, b: int, terms: int | None = None) -> Tensor:
    """R (..., b, b) for the numbers above the diagonal of Q: exact, or by a series with so many terms."""
    Q = skew(upper, b)
    return cayley(Q) if terms is None else cayley_neumann(Q, terms)


def _places(b: int, device: torch.device) -> Tensor:
    """Where the entries above the diagonal stand in a flattened b x b matrix."""
    rows, columns = torch.triu_indices(b, b, 1, device=device)
    return rows * b + columns
