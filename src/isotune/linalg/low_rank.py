"""Algebra on factored matrices B A, with B (m x r) and A (r x n), without forming the m x n product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 2**22
"""Numbers of a weight that are copied to a wider dtype at a time."""


def at_most_full_rank(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A with at most min(m, n) columns: B and A, or where r is larger, B A itself and an identity."""
    (m, r), n = B.shape, A.shape[1]
    if r <= min(m, n):
        return B, A
    one = torch.eye(min(m, n), dtype=B.dtype, device=B.device)
    return (B @ A, one) if n <= m else (one, B @ A)


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values of B A, B (m, r), A (r, n), descending, at most r of them: two QRs and an r x r SVD."""
    _, left = torch.linalg.qr(B)
    _, right = torch.linalg.qr(A.mT)
    return torch.linalg.svdvals(left @ right.mT)


def row_squares(W: Tensor) -> Tensor:
    """The squared length of every row of W (m x n), in fp32 or better."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32)).square()


def wide_product(W: Tensor, X: Tensor) -> Tensor:
    """`W X` in the dtype of X (n x r), for W (m x n) perhaps in a lower one, of which no whole copy is made."""
    rows = max(1, _AT_ONCE // W.shape[1])
    if W.dtype == X.dtype or len(W) <= rows:
        return W.to(X.dtype) @ X
    return torch.cat([block.to(X.dtype) @ X for block in W.split(rows)])


def row_squares_of_sum(W: Tensor, B: Tensor, A: Tensor, squares: Tensor) -> Tensor:
    """The squared length (m) of each row of `W + B A`, W (m, n), for `squares` those of W, with B A never formed.

        |w_i + b_i A|² = |w_i|² + b_i · (2 W Aᵀ + B A Aᵀ)_i

    It is computed in the dtype of B and A, which W's may be below. Cost: 2 m n r flops. Rounding
    may leave a row that cancels a little below zero; see `safe_norms`.
    """
    return squares + (B * (2 * wide_product(W, A.mT) + B @ (A @ A.mT))).sum(dim=1)


def safe_norms(squares: Tensor, scale: Tensor) -> Tensor:
    """The roots of squared row lengths (m), at least what rounding leaves of rows of squared length `scale` (m)."""
    limits = torch.finfo(squares.dtype)
    return torch.maximum(squares, limits.eps * scale + limits.tiny).sqrt()


class Factored(NamedTuple):
    """The matrix B A, as B (m, r) and A (r, n)."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B: at least the rank of B A."""
        return self.B.shape[1]

    @property
    def transposed(self) -> Factored:
        """The transpose, (B A)ᵀ."""
        return Factored(self.A.mT, self.B.mT)

    def dense(self) -> Tensor:
        """B A itself, (m, n)."""
        return self.B @ self.A

    def scaled(self, factor: float) -> Factored:
        """`factor` times the matrix."""
        return Factored(factor * self.B, self.A)

    def times(self, left: Tensor | None = None, right: Tensor | None = None) -> Factored:
        """`left B A right`, for dense matrices (p, m) and (n, q) such as orthogonal ones."""
        B = self.B if left is None else left @ self.B
        return Factored(B, self.A if right is None else self.A @ right)


def rounding(size: int, dtype: torch.dtype) -> float:
    """Below this share of the largest, a computed singular value of a matrix of that larger side is rounding.

    The singular values of a dense matrix of low rank that should be zero come out near 0.2 √size eps.
    """
    return max(8.0, size**0.5 / 2) * torch.finfo(dtype).eps


class SVD(NamedTuple):
    """`U diag(S) Vᵀ`, with U (m, k) and V (n, k) of orthonormal columns and S (k) descending."""

    U: Tensor
    S: Tensor
    V: Tensor

    def factored(self) -> Factored:
        """The same matrix with the singular values shared evenly: `(U √S) (√S Vᵀ)`."""
        root = self.S.sqrt()
        return Factored(self.U * root, root[:, None] * self.V.mT)

    def first(self, k: int) -> SVD:
        """The k largest singular triplets."""
        return SVD(self.U[:, :k], self.S[:k], self.V[:, :k])

    def supported(self, tolerance: float | None = None) -> SVD:
        """Without the triplets whose singular value is at most `tolerance` times the largest: those are rounding.

        By default the tolerance is that of `rounding` for the dtype. A zero matrix keeps none.
        """
        if tolerance is None:
            tolerance = rounding(max(len(self.U), len(self.V)), self.S.dtype)
        return self.first(int((tolerance * self.S[:1] < self.S).sum()))


def weighted_sum(terms: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """`Σ w_i B_i A_i`, exactly: the factors side by side, so that the ranks add up."""
    if not terms:
        raise ValueError("there is nothing to add")
    return Factored(
        torch.cat([w * term.B for term, w in zip(terms, weights, strict=True)], dim=1),
        torch.cat([term.A for term in terms], dim=0),
    )


def svd(matrix: Factored) -> SVD:
    """The thin SVD of B A with k = min(r, m, n) triplets, by QR of both sides and one SVD of their small core.

    The core is float64. Signs are fixed: the entry of largest size in each column of U is positive.
    Cost: O((m + n) r² + r³).
    """
    Q, left = torch.linalg.qr(matrix.B)
    P, right = torch.linalg.qr(matrix.A.mT)
    U, S, Vh = torch.linalg.svd(left.double() @ right.double().mT, full_matrices=False)
    U, V = Q @ U.to(Q), P @ Vh.mT.to(P)
    if len(S) == 0:
        return SVD(U, S.to(U), V)
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    return SVD(U * signs, S.to(U), V * signs)


def dense_svd(W: Tensor) -> SVD:
    """The thin SVD of a dense matrix, with min(m, n) triplets and whatever signs come out."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return SVD(U, S, Vh.mT)


def truncated(matrix: Factored, rank: int) -> tuple[Factored, float]:
    """The best approximation of B A of that rank, evenly split, and its error relative to B A (Frobenius).

    The error is `√(Σ_{i > rank} s_i² / Σ s_i²)`; a matrix of zeros has none.
    """
    found = svd(matrix)
    return found.first(rank).factored(), tail(found.S, rank)


def tail(S: Tensor, rank: int) -> float:
    """The share of the Frobenius norm in the singular values S (k) after the first `rank`; 0 where all are 0."""
    total = S.double().norm()
    return float(S[rank:].double().norm() / total) if total > 0 else 0.0


def inner(one: Factored, other: Factored) -> float:
    """The Frobenius inner product `<B A, D C> = Σ (BᵀD) ∘ (A Cᵀ)`, in float64."""
    return float(((one.B.double().mT @ other.B.double()) * (one.A.double() @ other.A.double().mT)).sum())


def norm(matrix: Factored) -> float:
    """The Frobenius norm of B A. By QR: the root of `inner` has half the digits where terms cancel."""
    left, right = torch.linalg.qr(matrix.B, mode="r").R, torch.linalg.qr(matrix.A.mT, mode="r").R
    return float((left.double() @ right.double().mT).norm())


def principal_cosines(U: Tensor, V: Tensor) -> Tensor:
    """The cosines of the principal angles between the columns of U and V (m, k and l), both orthonormal.

    min(k, l) of them, descending: 1 for a direction that both hold, 0 for spaces that are orthogonal.
    """
    return torch.linalg.svdvals(U.mT @ V).clamp(max=1.0)


def from_dense(W: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Factored, float]:
    """The best approximation of W (m, n) of that rank, and its error relative to W (Frobenius).

    Exactly by SVD where the rank is no small part of min(m, n); else from the range of W applied to random
    vectors, rank + 16 of them and 2 power iterations (Halko, Martinsson and Tropp 2011), at O(m n rank).
    """
    m, n = W.shape
    width = rank + 16
    total = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    if total == 0:
        return Factored(W.new_zeros(m, rank), W.new_zeros(rank, n)), 0.0
    if 4 * width >= min(m, n):
        found = dense_svd(W)
        return found.first(rank).factored(), tail(found.S, rank)
    generator = generator or torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(W @ torch.randn(n, width, generator=generator, dtype=torch.float32).to(W))
    for _ in range(2):
        Q, _ = torch.linalg.qr(W.mT @ Q)
        Q, _ = torch.linalg.qr(W @ Q)
    inside = Factored(Q, Q.mT @ W)
    outside = float(torch.linalg.vector_norm(W - inside.dense(), dtype=torch.float64))
    found = svd(inside)
    return found.first(rank).factored(), math.hypot(outside, float(found.S[rank:].double().norm())) / total
