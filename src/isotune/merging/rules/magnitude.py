"""Magnitude pruning, then the weighted sum.

    ΔW = λ Σ w_i τ_i,    τ_i = ΔW_i where |ΔW_i| is among the model's largest, else 0

The baseline of DARE's and TIES' papers; PEFT's "magnitude_prune", which prunes A and B instead of their product.
Cost: two or three walks over T dense changes, in blocks; the result is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pydantic import Field

from isotune.merging.contract import Aligned
from isotune.merging.rules.families.entrywise import Entrywise, Step
from isotune.merging.rules.families.magnitudes import TRIM, Trim, thresholds, trimming


class Magnitude(Entrywise):
    """The weighted sum of each change's largest entries."""

    name: ClassVar[str] = "magnitude"
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0}

    trim: Trim = Field("tensor", description=TRIM)
    density: float = Field(0.5, gt=0, le=1, description="Share of entries kept, the largest.")

    def survey(self, sites: Iterable[Aligned]) -> Any:
        return thresholds(sites, self.density, self.trim)

    def steps(self, site: Aligned, surveyed: Any) -> Sequence[Step]:
        return trimming(site, self.density, surveyed)
