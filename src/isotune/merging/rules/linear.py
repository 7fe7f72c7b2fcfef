"""The weighted mean of changes: of models, what is called a soup.

    ΔW = Σ w_i ΔW_i / Σ w_i

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time" (ICML 2022, arXiv 2203.05482). Cost: none, beside copying the factors.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from isotune.errors import OptionError
from isotune.linalg.change import Change, total
from isotune.merging.contract import Aligned, Rule


class Linear(Rule):
    """The weighted mean of the changes."""

    name: ClassVar[str] = "linear"
    linear: ClassVar[bool] = True

    normalize: bool = Field(True, description="Divide by the sum of the weights.")

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        whole = sum(site.weights) if self.normalize else 1.0
        if abs(whole) <= 1e-9 * sum(abs(w) for w in site.weights):
            raise OptionError(
                f"linear: the weights {', '.join(f'{w:g}' for w in site.weights)} sum to 0: there is no mean; "
                "change them, or set normalize=False for the sum"
            )
        return total(site.changes, [w / whole for w in site.weights])
