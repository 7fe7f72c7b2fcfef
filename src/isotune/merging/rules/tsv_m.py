"""TSV-M: the leading singular triplets of every model, made orthogonal to those of the others, then added.

    U_i S_i V_iᵀ  = the n leading triplets of w_i ΔW_i,    n = ⌊min(out, in) / T⌋
    ΔW = scale · polar([U_1 … U_T]) diag(S_1 … S_T) polar([V_1 … V_T])ᵀ

"Task Singular Vectors: Reducing Task Interference in Model Merging" (CVPR 2025, arXiv 2412.00081). A model of lower
rank than n, as an adapter mostly is, gives all its triplets and no more: the paper's code fills up with singular
vectors of its null space, which are arbitrary and turn the polar factors. Models that share a direction share it by
the polar factor; there the paper's code adds a term of arbitrary direction.
Cost: with factored changes of ranks that sum to R, two QR at O((out + in) R²) and O(R³); dense, T + 2 SVDs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from isotune.linalg.change import Change, scaled
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.joint_bases import Embeddings, Tolerance, decomposes, mean, reduced


class TSVM(Rule):
    """The leading singular triplets of all models, orthogonal to each other.

    Weights multiply the singular values of a model; its directions are as orthogonal to the others' whatever its
    weight, and a model of weight zero counts as absent. What is not decomposed is averaged: the sum of the
    weighted changes over the number of models with a weight other than zero, as in the paper's code.
    """

    name: ClassVar[str] = "tsv_m"

    tolerance: Tolerance = 0.0
    scale: float = Field(default=1.0, description="A factor on the merged change.")
    share: float | None = Field(
        default=None, gt=0, le=1, description="Share of min(out, in) that each model may keep; by default 1 / models."
    )
    embeddings: Embeddings = False

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        if not decomposes(site, self.embeddings):
            return scaled(mean(site), self.scale)
        joint = reduced(site.changes, site.weights, self.tolerance)
        p = min(site.changes[0].shape)
        kept = max(1, int(p * self.share) if self.share else p // len(joint.changes))
        parts = [joint.decomposed(change).first(kept) for change in joint.changes]
        return scaled(joint.composed(parts, torch.cat([found.S for found in parts])), self.scale)
