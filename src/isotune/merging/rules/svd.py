"""The weighted sum of changes at a given rank: the best approximation there is, in Frobenius norm.

    ΔW = truncate(Σ w_i ΔW_i, rank)        error = √(Σ_{j > rank} s_j²) / √(Σ s_j²)

Eckart and Young 1936. PEFT's "svd" is the same matrix, by an SVD of the dense sum, and says nothing of the error.
Cost: with factored changes of ranks that sum to R, two QR at O((out + in) R²) and an SVD of R x R. Dense sums are
decomposed by `from_dense`: exactly, or where the rank is small by random projection at O(out in rank).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from isotune.linalg.change import Change, total
from isotune.linalg.low_rank import Factored, from_dense, tail
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.joint_bases import reduced


class Svd(Rule):
    """The weighted sum of the changes, truncated to a rank.

    Weights multiply the changes before they are added. Tensors that are no layer's weight are added in full.
    """

    name: ClassVar[str] = "svd"

    rank: int | None = Field(
        default=None, ge=1, description="Rank of the result; by default the largest of the inputs."
    )

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return self.merge_with_error(site)[0]

    def merge_with_error(self, site: Aligned) -> tuple[Change, float]:
        """The merged change, and what truncating took from the sum, relative to it (Frobenius norm)."""
        if not site.matrix:
            return total(site.changes, site.weights), 0.0
        rank = self.rank or max(_rank(change) for change in site.changes)
        joint = reduced(site.changes, site.weights)
        together = joint.sum()
        if not isinstance(together, Factored):
            return from_dense(together, min(rank, *together.shape))
        found = joint.decomposed(together)
        return joint.restored(found.first(rank).factored()), tail(found.S, rank)


def _rank(change: Change) -> int:
    """The rank of factors as they are; the numerical rank of a dense matrix."""
    if isinstance(change, Factored):
        return change.rank
    joint = reduced([change], [1.0])
    return len(joint.decomposed(change).S)
