"""Algebra on factored matrices B A, with B (m x r) and A (r x n), without forming the m x n product."""

from __future__ import annotations

import torch
from torch import Tensor


def at_most_full_rank(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A with at most min(m, n) columns: B and A, or where r is larger, B A itself and an identity."""
    (m, r), n = B.shape, A.shape[1]
    if r <= min(m, n):
        return B, A
    one = torch.eye(min(m, n), dtype=B.dtype, device=B.device)
    return (B @ A, one) if n <= m else (one, B @ A)


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values of B A in descending order (at most r of them), by QR of both sides and an r x r SVD."""
    _, left = torch.linalg.qr(B)
    _, right = torch.linalg.qr(A.mT)
    return torch.linalg.svdvals(left @ right.mT)


def row_squares(W: Tensor) -> Tensor:
    """The squared length of every row of W (m x n)."""
    return torch.linalg.vector_norm(W, dim=1).square()


def row_squares_of_sum(W: Tensor, B: Tensor, A: Tensor, squares: Tensor) -> Tensor:
    """The squared length of every row of `W + B A` (m), for `squares` those of W, with B A never formed.

        |w_i + b_i A|² = |w_i|² + b_i · (2 W Aᵀ + B A Aᵀ)_i

    Cost: 2 m n r flops. Rounding may leave a row that cancels a little below zero; see `safe_norms`.
    """
    return squares + (B * (2 * (W @ A.mT) + B @ (A @ A.mT))).sum(dim=1)


def safe_norms(squares: Tensor, scale: Tensor) -> Tensor:
    """The roots of squared row lengths, positive: at least what rounding leaves of rows of squared length `scale`."""
    limits = torch.finfo(squares.dtype)
    return torch.maximum(squares, limits.eps * scale + limits.tiny).sqrt()
