"""Several factored matrices B_i A_i of one shape, stacked, and brought into one gauge.

(B, A) and (B G, G⁻¹ A) are the same matrix for any invertible G, so factors found apart cannot be compared as they
are. `balanced` leaves rotations alone as a choice, and `aligned` makes that choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotune.linalg.low_rank import Factored


class FactorStack(NamedTuple):
    """T matrices `B[i] A[i]`."""

    B: Tensor
    """(T, m, r)."""
    A: Tensor
    """(T, r, n)."""
    ranks: list[int]
    """The rank of each, at most r."""
    back: Tensor
    """(T, r, r), orthogonal: in `B[i] back[i]ᵀ` the columns from the matrix's own rank on are zero."""

    @property
    def rank(self) -> int:
        """r."""
        return self.B.shape[2]


def stacked(matrices: Sequence[Factored]) -> FactorStack:
    """The factors as they are, padded with zeros to the largest rank."""
    r = max(matrix.rank for matrix in matrices)
    B = torch.stack([F.pad(matrix.B, (0, r - matrix.rank)) for matrix in matrices])
    A = torch.stack([F.pad(matrix.A, (0, 0, 0, r - matrix.rank)) for matrix in matrices])
    return FactorStack(B, A, [matrix.rank for matrix in matrices], _identities(B, r))


def balanced(stack: FactorStack) -> FactorStack:
    """The same matrices as U √S and √S Vᵀ, by batched QR; what is rounding is left out, and r is the largest rank.

    Cost: O(T (m + n) r²).
    """
    Q, left = torch.linalg.qr(stack.B)
    P, right = torch.linalg.qr(stack.A.mT)
    U, S, Vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    real = max(Q.shape[1], P.shape[1]) * torch.finfo(S.dtype).eps * S[:, :1] < S
    ranks = real.sum(dim=1).tolist()
    r = max(ranks)
    root = torch.where(real, S, 0).sqrt()[:, None, :r]
    return FactorStack(Q @ U[:, :, :r] * root, (P @ Vh.mT[:, :, :r] * root).mT, ranks, _identities(Q, r))


def aligned(stack: FactorStack) -> FactorStack:
    """The same matrices as B G and Gᵀ A, each with the rotation G that brings its factors nearest to the others'.

    Nearest to those of the matrix of the largest rank and norm first, then to the mean of all (orthogonal Procrustes,
    `G = polar(Bᵀ B_ref + A A_refᵀ)`). Cost: O(T (m + n) r²).
    """
    norms = stack.B.square().sum((1, 2)).tolist()
    largest = max(range(len(norms)), key=lambda i: (stack.ranks[i], norms[i]))
    stack = _nearest(stack, stack.B[largest], stack.A[largest])
    return _nearest(stack, stack.B.mean(0), stack.A.mean(0))


def _nearest(stack: FactorStack, B: Tensor, A: Tensor) -> FactorStack:
    U, _, Vh = torch.linalg.svd(stack.B.mT @ B + stack.A @ A.mT)
    G = U @ Vh
    return FactorStack(stack.B @ G, G.mT @ stack.A, stack.ranks, stack.back @ G)


def squares(B: Tensor, A: Tensor) -> Tensor:
    """The squared Frobenius norms (T) of B A, for B (T, m, r) and A (T, r, n), in float64."""
    return ((B.mT @ B).double() * (A @ A.mT).double()).sum((1, 2)).clamp_min(0)


def _identities(B: Tensor, r: int) -> Tensor:
    return torch.eye(r, dtype=B.dtype, device=B.device).repeat(len(B), 1, 1)
