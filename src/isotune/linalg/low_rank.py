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
