"""Model breadcrumbs: without each weight's largest and smallest entries, then the weighted sum.

    ΔW = λ Σ w_i τ_i,    τ_i = ΔW_i from the place γ n on, `density` n of its entries, n in all, the largest first

Davari and Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks" (ECCV 2024, arXiv
2312.06795). At least one entry of a weight stays, and a small one, of fewer than 1/γ entries, loses no large one.
Cost: three walks over T dense changes, in blocks; the result is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from isotune.merging.contract import Aligned
from isotune.merging.rules.families.entrywise import Entrywise, Step
from isotune.merging.rules.families.magnitudes import without_outliers


class Breadcrumbs(Entrywise):
    """The weighted sum of the changes without their largest and smallest entries."""

    name: ClassVar[str] = "breadcrumbs"
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0, "gamma": 0.0}

    density: float = Field(0.9, gt=0, le=1, description="Share of each weight's entries that is kept.")
    gamma: float = Field(
        0.01, ge=0, lt=1, description="Share of the largest that is dropped, where density allows it."
    )

    def steps(self, site: Aligned, surveyed: Any) -> Sequence[Step]:
        return [without_outliers(change, self.density, self.gamma) for change in site.changes]
