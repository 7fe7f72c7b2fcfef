"""DARE, then the election of TIES: entries are dropped at random, and the models that agree on a sign averaged.

    τ_i = m_i ∘ ΔW_i / density,    m_i ~ Bernoulli(density)
    g   = sign(Σ τ_i),    ΔW = λ mean of the τ_i with sign(τ_i) = g

Yu et al. (arXiv 2311.03099) and Yadav et al. (arXiv 2306.01708); see `dare` and `ties`. Cost: one walk over T dense
changes, in blocks; the result is dense.
"""

from __future__ import annotations

from typing import ClassVar

from isotune.merging.rules.dare import DARE
from isotune.merging.rules.families.entrywise import Elected


class DARETIES(Elected, DARE):
    """Drop random entries of the changes, elect a sign for each entry, average the models that agree."""

    name: ClassVar[str] = "dare_ties"
