"""What the spectral rules share.

A change is ΔW_i = Q X_i Pᵀ in orthonormal bases Q and P of what the models' columns and rows span together. Turning
the bases turns what a spectral rule gives, so it is computed on the small X_i and put back: for factored changes of
ranks that sum to R, two QR at O((out + in) R²), and the rest on matrices of at most R x R in float64. Dense changes
stay as they are.

Singular values that are no more than rounding have no direction of their own, so no rule uses them: the factored and
the dense form of a change give the same, and nothing comes from the arbitrary basis of a null space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from isotune.linalg.change import Change, dense, scaled, total
from isotune.linalg.low_rank import SVD, Factored, dense_svd, rounding, svd
from isotune.merging.contract import Aligned

Tolerance = Annotated[
    float, Field(ge=0, lt=1, description="Singular values up to this share of the largest count as zero.")
]
"""An option for changes of low rank that come as differences of stored weights, with the noise of their dtype."""

Embeddings = Annotated[
    bool,
    Field(
        description="Decompose every 2-D tensor, embeddings too, as the authors' code does; else weights of layers."
    ),
]
"""An option for rules whose authors' code looks at the number of dimensions alone."""


@dataclass(frozen=True)
class Reduced:
    """Changes in joint bases, each multiplied by its weight; those of weight zero are left out."""

    changes: Sequence[Change]
    dtype: torch.dtype
    """That of the given changes."""
    tolerance: float
    """Singular values up to this share of the largest are rounding."""
    bases: tuple[Tensor, Tensor] | None = None
    """Q and P; None for dense changes."""

    def sum(self) -> Change:
        """`Σ w_i ΔW_i` in the joint bases."""
        return total(self.changes, [1.0] * len(self.changes))

    def decomposed(self, change: Change, least: float = 0.0) -> SVD:
        """The SVD of a matrix in the joint bases, without the singular values that are rounding.

        Those are the ones up to the tolerance times the largest, or times `least` if that is larger.
        """
        found = svd(change) if isinstance(change, Factored) else dense_svd(change)
        threshold = self.tolerance * found.S[:1].clamp(min=least)
        return found.first(int((threshold < found.S).sum()))

    def composed(self, parts: Sequence[SVD], S: Tensor) -> Change:
        """The change `U diag(S) Vᵀ`, S (k), of singular vectors side by side, U and V made orthonormal each."""
        U, V = (self._orthogonal(torch.cat(side, dim=1)) for side in zip(*((f.U, f.V) for f in parts), strict=True))
        root = S.sqrt()
        return self.restored(Factored(U * root, root[:, None] * V.mT))

    def _orthogonal(self, columns: Tensor) -> Tensor:
        """The matrix with orthonormal columns nearest to `columns` (m, k): its polar factor, U Vᵀ of U S Vᵀ.

        Columns that depend on each other have none: they share the directions that they have in common. They
        depend where a singular value is below the root of eps.
        """
        found = dense_svd(columns).supported(torch.finfo(self.dtype).eps ** 0.5)
        return found.U @ found.V.mT

    def restored(self, change: Change) -> Change:
        """A matrix in the joint bases as the change that it stands for."""
        if self.bases is None or not isinstance(change, Factored):
            return dense(change)
        Q, P = self.bases
        return Factored(Q @ change.B.to(Q), change.A.to(P) @ P.mT)


def reduced(changes: Sequence[Change], weights: Sequence[float], tolerance: float = 0.0) -> Reduced:
    """The changes in their joint bases. A `tolerance` above that of rounding takes its place."""
    pairs = [(change, w) for change, w in zip(changes, weights, strict=True) if w] or [(changes[0], 0.0)]
    factors = [change for change, _ in pairs if isinstance(change, Factored)]
    if len(factors) < len(pairs):
        matrices = [w * dense(change) for change, w in pairs]
        dtype, size = matrices[0].dtype, max(matrices[0].shape)
        return Reduced(matrices, dtype, max(tolerance, rounding(size, dtype)))
    Q, left = torch.linalg.qr(torch.cat([term.B for term in factors], dim=1))
    P, right = torch.linalg.qr(torch.cat([term.A for term in factors], dim=0).mT)
    ranks = [term.rank for term in factors]
    parts = zip(left.double().split(ranks, dim=1), right.double().split(ranks, dim=1), pairs, strict=True)
    cores = [Factored(w * B, A.mT) for B, A, (_, w) in parts]
    return Reduced(cores, Q.dtype, max(tolerance, rounding(sum(ranks), Q.dtype)), (Q, P))


def flattened(S: Tensor, flatness: float) -> Tensor:
    """Singular values (k) drawn to their mean: `(1 - flatness) S + flatness mean(S)`."""
    return torch.lerp(S, S.mean(), flatness) if len(S) else S


def decomposes(site: Aligned, embeddings: bool) -> bool:
    """Whether a spectral rule takes the tensor for a matrix: the weights of layers and, if asked, embeddings."""
    return site.matrix or (embeddings and len(site.changes[0].shape) == 2)


def mean(site: Aligned) -> Change:
    """`Σ w_i ΔW_i / T` over the T models whose weight is not zero."""
    return scaled(total(site.changes, site.weights), 1 / max(1, sum(w != 0 for w in site.weights)))
