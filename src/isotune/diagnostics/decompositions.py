"""The singular triplets of a weight before and after its change, which most measures start from.

    W = U0 S0 V0ᵀ (all triplets),   W' = W + dW = U S Vᵀ (the k leading ones)

The full decomposition of W is what costs, O(out in min(out, in)); many adapters of one base share it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from isotune.linalg.change import Change, size
from isotune.linalg.leading import leading_svd
from isotune.linalg.low_rank import SVD, Factored, dense_svd


@dataclass(frozen=True)
class Spectra:
    """Both decompositions."""

    base: SVD
    """All min(out, in) triplets of W."""
    adapted: SVD
    """The k leading triplets of W'."""

    @property
    def k(self) -> int:
        """How many triplets of W' there are; at most min(out, in)."""
        return len(self.adapted.S)


def spectra(W: Tensor, change: Change, k: int = 10, base: SVD | None = None) -> Spectra:
    """Decompose W (out, in) and `W + change`; `base` is W's full thin SVD where it is known already.

    A change of nothing leaves W's own triplets. A factored change is never multiplied out where an iteration with
    the operator `x -> W x + B (A x)` costs less than another dense SVD.
    """
    base = dense_svd(W) if base is None else base
    if size(change) == 0:
        return Spectra(base, base.first(k))
    if isinstance(change, Factored):
        return Spectra(base, leading_svd(W, change, k, base.U[:, :k]))
    return Spectra(base, leading_svd(W + change, None, k, base.U[:, :k]))
