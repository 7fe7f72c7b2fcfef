"""DARE, then the election of TIES: entries are dropped at random, and the models that agree on a sign averaged.

    τ_i = m_i ∘ ΔW_i / density,    m_i ~ Bernoulli(density)
    g   = sign(Σ τ_i),    ΔW = λ mean of the τ_i with sign(τ_i) = g

Yu et al. (arXiv 2311.03099) and Yadav et al. (arXiv 2306.01708); see `dare` and `ties`. Cost: one walk over T dense
changes, in blocks; the result is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from isotune.merging.contract import Aligned
from isotune.merging.entrywise import UNBIASED, Elected, Step, dropping


class DARETIES(Elected):
    """Drop random entries of the changes, elect a sign for each entry, average the models that agree."""

    name: ClassVar[str] = "dare_ties"
    random: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0}

    density: float = Field(0.5, gt=0, le=1, description="Probability with which an entry is kept.")
    unbiased: bool = Field(True, description=UNBIASED)

    def steps(self, site: Aligned, surveyed: Any) -> Sequence[Step]:
        return dropping(site, self.density, self.unbiased)
