"""TIES: trim every change, elect a sign for each entry, average the models that agree.

    τ_i = ΔW_i where |ΔW_i| is among the model's largest, else 0
    g   = sign(Σ τ_i),    ΔW = λ mean of the τ_i with sign(τ_i) = g

Yadav et al., "TIES-merging: resolving interference when merging models" (NeurIPS 2023, arXiv 2306.01708). Trimmed
over the whole model, as there, by a histogram (to 0.2 % of the threshold, and interpolated); one weight's threshold
is exact. Entries of the same magnitude as the last are kept too. Where the sum is 0 no sign is elected and the entry
is 0. Cost: two walks over T dense changes, in blocks; the result is dense.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from isotune.merging.rules.families.entrywise import Elected
from isotune.merging.rules.families.magnitudes import TRIM, Trim
from isotune.merging.rules.magnitude import Magnitude


class TIES(Elected, Magnitude):
    """Trim the changes, elect a sign for each entry, average the models that agree."""

    name: ClassVar[str] = "ties"

    density: float = Field(0.2, gt=0, le=1, description="Share of each model's entries that is kept.")
    trim: Trim = Field("model", description=TRIM)
