"""Iso-CTS: the leading directions of the sum, those of each model beside them, all singular values equal.

    M = Σ w_i ΔW_i of rank p;    n = round((p - ⌊common p⌋) / T),    k = p - T n
    U_c S_c V_cᵀ  = the k leading triplets of M
    U_i S_i V_iᵀ  = the n leading triplets of (I - U_c U_cᵀ) w_i ΔW_i
    ΔW = scale · polar([U_1 … U_T U_c]) diag(s) polar([V_1 … V_T V_c])ᵀ,    s = mean of all S_i and S_c

"No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces" (ICML 2025, arXiv 2502.04959).
The paper has p = min(out, in); here p is the numerical rank of M, which is the same for a sum of full rank, and where
it is lower leaves the arbitrary basis of the null space out. Triplets of no more than rounding are left out of the
stacks for the same reason, and directions that two models share are shared by the polar factor. n is at most p / T,
where the paper's code lets k become negative (small `common`, many models).
Cost: with factored changes of ranks that sum to R, two QR at O((out + in) R²) and O(R³); dense, T + 3 SVDs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isotune.linalg.change import Change, scaled
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.joint_bases import Embeddings, Tolerance, decomposes, flattened, mean, reduced


class IsoCTS(Rule):
    """Common directions and those of single models, with equal singular values.

    Weights multiply the changes at the start, so a larger weight gives a model more of the common directions, not
    more of its own. A model of weight zero counts as absent. What is not decomposed is
    averaged: the sum of the weighted changes over the number of models with a weight other than zero, as in the
    paper's code.
    """

    name: ClassVar[str] = "iso_cts"
    neutral: ClassVar[dict[str, Any]] = {"flatness": 0.0}

    common: float = Field(
        default=0.8, ge=0, le=1, description="Share of directions taken from the sum of all models."
    )
    scale: float = Field(default=1.0, description="A factor on the merged change.")
    flatness: float = Field(default=1.0, ge=0, le=1, description="How equal singular values become; 0: not at all.")
    tolerance: Tolerance = 0.0
    embeddings: Embeddings = False

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        if not decomposes(site, self.embeddings):
            return scaled(mean(site), self.scale)
        joint = reduced(site.changes, site.weights, self.tolerance)
        whole = joint.decomposed(joint.sum())
        p, T = len(whole.S), len(joint.changes)
        own = min(round((p - int(p * self.common)) / T), p // T)
        shared = whole.first(p - T * own)
        parts = [shared]
        if own:
            largest = float(whole.S[0])
            parts += [joint.decomposed(_outside(shared.U, x), largest).first(own) for x in joint.changes]
        S = flattened(torch.cat([found.S for found in parts]), self.flatness)
        return scaled(joint.composed(parts, S), self.scale)


def _outside(U: Tensor, change: Change) -> Change:
    """`(I - U Uᵀ) ΔW`."""
    if isinstance(change, Factored):
        return Factored(change.B - U @ (U.mT @ change.B), change.A)
    return change - U @ (U.mT @ change)
