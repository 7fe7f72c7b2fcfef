"""The weighted sum of changes, exactly: the factors side by side.

    ΔW = Σ w_i ΔW_i,    B = [w_1 B_1 | … | w_T B_T],    A = [A_1; …; A_T]

The rank is the sum of the ranks. Adding the A's and the B's separately, as PEFT's "linear" does, gives cross terms
B_i A_j; they are in no model. Cost: none, beside copying the factors.
"""

from __future__ import annotations

from typing import Any, ClassVar

from isotune.linalg.change import Change, total
from isotune.merging.contract import Aligned, Rule


class Sum(Rule):
    """The weighted sum of the changes, exactly."""

    name: ClassVar[str] = "sum"
    linear: ClassVar[bool] = True

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return total(site.changes, site.weights)
