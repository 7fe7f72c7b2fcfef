"""The largest singular triplets of `W + B A`, without the dense sum where a few products with it will do.

Block Lanczos with full reorthogonalisation: a basis Q grows by a block at a time, `op opᵀ` times the one before, and
the triplets of `Qᵀ op` are those wanted once `|op v - σ u|` says so. The first block holds the directions that are
likely, such as the leading ones of W and the columns of B. Where that would take no less than a dense SVD, or does
not converge, the SVD is dense.

Source: Golub, Luk and Overton, "A Block Lanczos Method for Computing the Singular Values and Corresponding Singular
Vectors of a Matrix" (1981). Cost: O(m n) for each column of Q; m, n the sizes of W, r the rank of B A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.linalg.low_rank import SVD, Factored, dense_svd

_MORE = 4  # random columns, by which a direction that the start lacks is found
_EPS = 16  # the least residual at which a triplet has converged, in units of the dtype's rounding and largest value


def leading_svd(W: Tensor, change: Factored | None, k: int, start: Tensor | None = None) -> SVD:
    """The k largest singular triplets of `W + B A` (m x n), or of W, in W's dtype; signs are those that come.

    Args:
        W: (m, n), fp32 or better.
        change: B A, or None.
        k: How many; at most min(m, n) are given.
        start: (m, l) directions to start from, such as W's own leading ones.
    """
    m, n = W.shape
    first = [W.new_zeros(m, 0) if start is None else start]
    if change is not None:
        first.append(change.B)
    lacking = max(k - sum(block.shape[1] for block in first), 0) + _MORE
    noise = torch.randn(m, lacking, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = torch.cat([*first, noise.to(W)], dim=1)
    if 4 * block.shape[1] > min(m, n):
        return dense_svd(W if change is None else W + change.dense()).first(k)
    return _krylov(W, change, k, block) or dense_svd(W if change is None else W + change.dense()).first(k)


def _krylov(W: Tensor, change: Factored | None, k: int, block: Tensor) -> SVD | None:
    """The same, from a first block (m, l); None where it has not converged by half of all directions."""
    Q, _ = torch.linalg.qr(block)
    new, rows = Q, W.new_zeros(W.shape[1], 0)
    # A product with W rounds by about the square root of the numbers added, in whatever order they are.
    converged = max(_EPS, max(W.shape) ** 0.5) * torch.finfo(W.dtype).eps
    while True:
        image = _times(new.mT, W, change).mT
        rows = torch.cat([rows, image], dim=1)  # (Qᵀ op)ᵀ
        V, S, Uh = torch.linalg.svd(rows, full_matrices=False)
        V, S, U = V[:, :k], S[:k], Q @ Uh.mT[:, :k]
        through = _through(W, change, V)
        residual = torch.linalg.vector_norm(through - U * S, dim=0).max()
        if residual <= converged * S[0]:
            return SVD(U, S, V)
        if 2 * (Q.shape[1] + block.shape[1]) > min(W.shape):
            return None
        new = _through(W, change, torch.linalg.qr(image)[0])
        for _ in range(2):  # once leaves rounding of the directions that Q holds already
            new, _ = torch.linalg.qr(new - Q @ (Q.mT @ new))
        Q = torch.cat([Q, new], dim=1)


def _times(X: Tensor, W: Tensor, change: Factored | None) -> Tensor:
    """`X (W + B A)` for X (l, m)."""
    return X @ W if change is None else X @ W + (X @ change.B) @ change.A


def _through(W: Tensor, change: Factored | None, X: Tensor) -> Tensor:
    """`(W + B A) X` for X (n, l)."""
    return W @ X if change is None else W @ X + change.B @ (change.A @ X)
