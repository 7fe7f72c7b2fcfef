"""DARE: drop entries at random and rescale the others, then the weighted sum.

    ΔW = λ Σ w_i m_i ∘ ΔW_i / density,    m_i ~ Bernoulli(density),    E ΔW = λ Σ w_i ΔW_i

Yu et al., "Language models are super Mario: absorbing abilities from homologous models as a free lunch" (ICML 2024,
arXiv 2311.03099), where 1 - density is the drop rate p. What is dropped depends on the seed, the weight's name and
the model's name. Cost: one walk over T dense changes, in blocks; the result is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from isotune.merging.contract import Aligned
from isotune.merging.rules.families.entrywise import UNBIASED, Entrywise, Step, dropping


class DARE(Entrywise):
    """The weighted sum of changes of which random entries are dropped and the others rescaled."""

    name: ClassVar[str] = "dare"
    random: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0}

    density: float = Field(0.5, gt=0, le=1, description="Probability with which an entry is kept.")
    unbiased: bool = Field(True, description=UNBIASED)

    def steps(self, site: Aligned, surveyed: Any) -> Sequence[Step]:
        return dropping(site, self.density, self.unbiased)
