"""OPCM: models arrive one after the other, and each is projected away from what is merged already.

    S_1 = w_1 ΔW_1;    S_{t-1} = U diag(s) Vᵀ,  k: how many of the s come before their sum exceeds alpha of the whole
    D: the diagonal and the leading k x k block of Uᵀ (w_t ΔW_t) V, and zero elsewhere
    S_t = S_{t-1} + w_t ΔW_t - U D Vᵀ,       ΔW = S_T · mean_i |ΔW_i| / |S_T|    (norms over the whole model)

"Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging" (NeurIPS
2025, arXiv 2501.09522). The paper keeps the merged model after each rescaling, and a factor to undo it; keeping the
sum S_t is the same. Only singular vectors above rounding are used: the paper's code also takes the diagonal from the
arbitrary basis of the null space, and at alpha = 1 projects least (k = 0) where it should project most; `compat`
does both as the code does. Cost of model t: with factored changes of ranks that sum to R up to it, an SVD of R x R
and, once for all given together, two QR at O((out + in) R²); dense, an SVD of the weight's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isotune.linalg.change import Change, dense, total
from isotune.linalg.low_rank import SVD, Factored, dense_svd
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.joint_bases import Reduced, reduced


class OPCM(Rule):
    """One model after the other, each projected away from the dominant directions of those before.

    The order of the models matters. Weights multiply the changes before they are projected and added; the size of
    the result does not depend on them, since in the end the whole change is scaled to the mean norm of the models'
    own. (A model of weight zero adds its norm to that mean, and nothing else.) Tensors that are no layer's weight
    are added without projection.
    """

    name: ClassVar[str] = "opcm"
    symmetric: ClassVar[bool] = False

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the singular values' sum that is protected; useful: 0.3 to 0.7.",
    )
    rank: int | None = Field(
        default=None, ge=1, description="Truncate what is merged to this rank after each model; by default not."
    )
    compat: bool = Field(
        default=False, description="Project in null spaces too, and not at all at alpha = 1, as the paper's code."
    )

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return self.merge_into(None, site)

    def merge_into(self, before: Change | None, site: Aligned) -> Change:
        """The sum S after the site's models, given the one before them (None: they are the first)."""
        terms = ([] if before is None else [before]) + list(site.changes)
        weights = [1.0] * (len(terms) - len(site.weights)) + list(site.weights)
        if not site.matrix:
            return total(terms, weights)
        if self.compat:
            terms = [dense(change) for change in terms]
        joint = reduced(terms, weights)
        merged, *arriving = joint.changes
        merged = self._truncated(joint, merged)
        for change in arriving:
            found = dense_svd(dense(merged)) if self.compat else joint.decomposed(merged)
            merged = self._truncated(joint, self._added(found, merged, change))
        return joint.restored(merged) if joint.bases else merged

    def rescale(self, norms: Sequence[float], merged: float) -> float:
        return sum(norms) / len(norms) / merged if merged > 0 else 1.0

    def _added(self, found: SVD, merged: Change, change: Change) -> Change:
        """`S + ΔW - U D Vᵀ`, where S = U diag(s) Vᵀ is the SVD of what is merged."""
        U, s, V = found
        left, right = (U.mT @ change.B, change.A @ V) if isinstance(change, Factored) else (U.mT @ change, V)
        k = self._protected(s)
        D = torch.diag_embed((left * right.mT).sum(dim=1))
        D[:k, :k] = left[:k] @ right[:, :k]
        if isinstance(change, Factored):
            core = torch.diag_embed(s) - D
            return Factored(torch.cat([U @ core, change.B], dim=1), torch.cat([V.mT, change.A]))
        return dense(merged) + change - U @ D @ V.mT

    def _truncated(self, joint: Reduced, merged: Change) -> Change:
        return joint.decomposed(merged).first(self.rank).factored() if self.rank else merged

    def _protected(self, s: Tensor) -> int:
        """How many singular values come before the first at which their sum exceeds alpha of the whole."""
        if self.alpha == 1 and not self.compat:
            return len(s)
        return int((s.cumsum(dim=0) / s.sum() > self.alpha).int().argmax()) if len(s) else 0
