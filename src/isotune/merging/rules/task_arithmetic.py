"""Task arithmetic: the scaled sum of changes; a negative weight takes what a model learned away.

    ΔW = λ Σ w_i ΔW_i

Ilharco et al., "Editing models with task arithmetic" (ICLR 2023, arXiv 2212.04089), where λ is searched; with
several models 0.3 to 0.4 is common. Cost: none, beside copying the factors.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from isotune.linalg.change import Change, total
from isotune.merging.contract import Aligned, Rule


class TaskArithmetic(Rule):
    """The scaled sum of the changes."""

    name: ClassVar[str] = "task_arithmetic"

    scale: float = Field(1.0, description="Factor on the sum of the changes; the paper's lambda.")

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return total(site.changes, [self.scale * w for w in site.weights])
