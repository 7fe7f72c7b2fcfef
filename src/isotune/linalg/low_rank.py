"""Algebra on factored matrices B A, with B (m x r) and A (r x n), without forming the m x n product."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values of B A in descending order (at most r of them), by QR of both sides and an r x r SVD."""
    _, left = torch.linalg.qr(B)
    _, right = torch.linalg.qr(A.mT)
    return torch.linalg.svdvals(left @ right.mT)
