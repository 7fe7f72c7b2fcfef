"""A few basis vectors for several vectors at once, at many positions, by one batched SVD (Eckart and Young).

min ‖X - M C‖_F,   X = U S Vᵀ (d x T) for T vectors,   M = U_p (d x p),   C = S_p V_pᵀ (p x T)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SharedBasis(NamedTuple):
    """T vectors at each of b positions as `M C`, or `mean + M C`."""

    M: Tensor
    """(b, d, p), with orthonormal columns."""
    C: Tensor
    """(b, p, T)."""
    mean: Tensor | None = None
    """(b, d, 1): the mean of the T vectors, which then counts as one of the basis vectors."""

    @property
    def size(self) -> int:
        """The number of basis vectors, p, and one more where there is a mean."""
        return self.M.shape[2] + (self.mean is not None)

    def first(self, size: int) -> SharedBasis:
        """With `size` basis vectors, the most important ones."""
        p = size - (self.mean is not None)
        return SharedBasis(self.M[:, :, :p], self.C[:, :p], self.mean)

    def left(self, size: int) -> Tensor:
        """What `first(size)` leaves of each vector over all positions, shape (T): the sums of squares, in float64.

        They add up to the sum of the squared singular values after the first p.
        """
        p = size - (self.mean is not None)
        return self.C[:, p:].double().square().sum((0, 1))

    def vectors(self, which: slice = slice(None)) -> Tensor:
        """The vectors (b, d, T), or some of them."""
        found = self.M @ self.C[:, :, which]
        return found if self.mean is None else found + self.mean


def shared_basis(X: Tensor, center: bool = False) -> SharedBasis:
    """All min(d, T) basis vectors of X (b, d, T), the most important first; `center` takes out the mean before."""
    mean = X.mean(dim=2, keepdim=True) if center else None
    U, S, Vh = torch.linalg.svd(X if mean is None else X - mean, full_matrices=False)
    return SharedBasis(U, S[:, :, None] * Vh, mean)
