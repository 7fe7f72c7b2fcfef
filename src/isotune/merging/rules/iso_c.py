"""Iso-C: the sum of the changes with all its singular values made equal.

    Σ w_i ΔW_i = U S Vᵀ,    ΔW = scale · U diag((1 - flatness) S + flatness mean(S)) Vᵀ

"No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces" (ICML 2025, arXiv 2502.04959).
The paper flattens all min(out, in) singular values. Where the sum has a lower rank R, as with adapters, the singular
vectors of the others are an arbitrary basis of its null space, and most of the merged change would lie there; so only
the R that are above rounding are flattened, for factored and for dense changes. They are the same for a sum of full
rank. Cost: with factored changes two QR at O((out + in) R²) and an SVD of R x R; dense, an SVD of the sum.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from isotune.linalg.change import Change, dense, scaled, total
from isotune.linalg.low_rank import SVD, dense_svd
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.joint_bases import Embeddings, Tolerance, decomposes, flattened, mean, reduced


class IsoC(Rule):
    """The sum of the changes with equal singular values.

    Weights multiply the changes before they are added; only their ratios change the directions, and their common
    size acts as `scale` does. What is not decomposed is averaged: the sum of the weighted changes over the number
    of models with a weight other than zero, as in the paper's code.
    """

    name: ClassVar[str] = "iso_c"
    neutral: ClassVar[dict[str, Any]] = {"flatness": 0.0}

    scale: float = Field(default=1.0, description="A factor on the merged change.")
    flatness: float = Field(
        default=1.0, ge=0, le=1, description="How equal singular values become; 0: the plain sum."
    )
    tolerance: Tolerance = 0.0
    embeddings: Embeddings = False
    compat: bool = Field(default=False, description="Flatten all min(out, in) singular values, as the paper's code.")

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        if not decomposes(site, self.embeddings):
            return scaled(mean(site), self.scale)
        if self.compat:
            found = dense_svd(dense(total(site.changes, site.weights)))
            return self.scale * (found.U * flattened(found.S, self.flatness)) @ found.V.mT
        joint = reduced(site.changes, site.weights, self.tolerance)
        found = joint.decomposed(joint.sum())
        merged = SVD(found.U, flattened(found.S, self.flatness), found.V).factored()
        return scaled(joint.restored(merged), self.scale)
