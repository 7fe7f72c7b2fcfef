"""KnOTS: bring the changes to a basis that they share, merge them there entry by entry, and come back.

    [ΔW_1 | … | ΔW_T] = U S [V_1ᵀ | … | V_Tᵀ],    Z_i = S V_iᵀ = Uᵀ ΔW_i,    ΔW = U merge(Z_1, …, Z_T)

Stoica et al., "Model merging with SVD to tie the knots" (ICLR 2025, arXiv 2410.19735). By a rule that is linear in
the changes it changes nothing; what it is for is TIES and DARE-TIES. Of factored changes U comes from QR of the
factors and an SVD of a core of R = Σ r_i rows, at O((in + out) R² + R³), and Z_i stays factored until it is merged in
blocks; the result has rank R at most. Of dense ones it costs O(T in out² + out³). All in float64.

Tensors that are no matrices (biases, norms) are merged by the same rule as they are, each trimmed by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from isotune.linalg.change import Change, dense, scaled
from isotune.linalg.low_rank import SVD, Factored
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.dare_ties import DARETIES
from isotune.merging.rules.families.entrywise import AVERAGE, ELECT, Average, Elect
from isotune.merging.rules.families.magnitudes import TRIM, Trim
from isotune.merging.rules.linear import Linear
from isotune.merging.rules.ties import TIES

_SUPPORT = 1e-5
"""Directions of a smaller singular value, relative to the largest, are rounding; the authors: absolute."""


class KnOTS(Rule):
    """Merge the changes entry by entry in a basis that they share."""

    name: ClassVar[str] = "knots"
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0}

    rule: Literal["ties", "mean", "dare_ties"] = Field("ties", description="How entries are merged in the basis.")
    side: Literal["out", "in"] = Field("out", description="Which side's basis the changes share.")
    density: float = Field(0.2, gt=0, le=1, description="Share of the entries in the basis that is kept.")
    trim: Trim = Field("model", description=TRIM)
    elect: Elect = Field("total", description=ELECT)
    average: Average = Field("mean", description=AVERAGE)
    scale: float = Field(1.0, description="Factor on the merged change.")

    def survey(self, sites: Iterable[Aligned]) -> Any:
        return self._inner.survey(self._in_basis(site)[1] for site in sites if site.matrix)

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        if not site.matrix:
            # Without a survey each tensor is trimmed by itself.
            return scaled(self._inner.merge(site, None), self.scale)
        U, inside = self._in_basis(site)
        Z = scaled(self._inner.merge(inside, surveyed), self.scale)
        if not site.factored:
            merged = U @ dense(Z)
            return merged.mT if self.side == "in" else merged
        found = Z.times(left=U) if isinstance(Z, Factored) else Factored(U, Z)
        return found.transposed if self.side == "in" else found

    @property
    def _inner(self) -> Rule:
        if self.rule == "mean":
            return Linear()
        if self.rule == "dare_ties":
            return DARETIES(density=self.density, elect=self.elect, average=self.average)
        return TIES(density=self.density, trim=self.trim, elect=self.elect, average=self.average)

    def _in_basis(self, site: Aligned) -> tuple[Tensor, Aligned]:
        """U (out, k) and the site with each change as Z_i (k, in); with `side="in"` of the transposed changes."""
        changes = [_transposed(change) if self.side == "in" else change for change in site.changes]
        U = _basis(changes)
        inside = tuple(c.times(left=U.mT) if isinstance(c, Factored) else U.mT @ c for c in changes)
        return U, Aligned(site.path, site.names, inside, site.weights, seed=site.seed)


def _transposed(change: Change) -> Change:
    return change.transposed if isinstance(change, Factored) else change.mT


def _basis(changes: list[Change]) -> Tensor:
    """An orthonormal basis (out, k) of all columns of the changes: the left singular vectors of [ΔW_1 | … | ΔW_T]."""
    factors = [change for change in changes if isinstance(change, Factored)]
    if len(factors) == len(changes):
        dtype = factors[0].B.dtype
        Q, left = torch.linalg.qr(torch.cat([f.B.double() for f in factors], dim=1))
        lefts = left.split([f.rank for f in factors], dim=1)
        core = torch.cat(
            [own @ torch.linalg.qr(f.A.mT.double(), mode="r").R.mT for own, f in zip(lefts, factors, strict=True)],
            dim=1,
        )
    else:
        whole = [dense(change) for change in changes]
        dtype, Q, core = whole[0].dtype, None, whole[0].new_empty(len(whole[0]), 0, dtype=torch.float64)
        for W in whole:
            core = torch.linalg.qr(torch.cat([core, W.double()], dim=1).mT, mode="r").R.mT
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    U = SVD(U, S, Vh.mT).supported(_SUPPORT).U
    return (U if Q is None else Q @ U).to(dtype)
