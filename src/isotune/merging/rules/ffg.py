"""Fast Fisher grafting: take back what hardly matters to a model, then the weighted mean.

    ΔW = Σ c_i m_i ∘ ΔW_i / Σ c_i,    m_i = [v_i ΔW_i² >= t_i]

v_i is Adam's second moment at the end of the model's training, which stands in for its diagonal Fisher information;
`v ΔW²` is then about twice what it costs to give an entry its base value again. t_i is the quantile that leaves
`density` of all entries that the model changed, over the whole model; the authors pick t_i by hand.

Paper: "Harnessing Optimization Dynamics for Curvature-Informed Model Merging", 2025, arXiv 2509.11167. Cost: two
passes over the dense changes and statistics. The result has full rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from isotune.checkpoint.files import Statistic
from isotune.linalg.change import Change
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.by_statistic import LogHistogram, plain_mean, rescaled, saliency, statistics_of


class FFG(Rule):
    """The weighted mean of the changes, each with its least salient entries taken back."""

    name: ClassVar[str] = "ffg"
    statistic: ClassVar[Statistic | None] = "second_moment"
    exact_rank: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0}

    density: float = Field(0.4, gt=0, le=1, description="Share of all changed entries of a model that stay.")
    keep_norm: bool = Field(False, description="Scale what stays to the operator norm that the change had.")

    def survey(self, sites: Iterable[Aligned]) -> dict[str, float]:
        """The threshold of each model."""
        return thresholds(self, self.density, sites)

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        changes = [change for change, _ in grafted(self, self.keep_norm, site, surveyed)]
        return plain_mean(changes, site.weights)


def thresholds(rule: Rule, density: float, sites: Iterable[Aligned]) -> dict[str, float]:
    """For each model what the saliency of an entry must reach, so that `density` of the model's entries do."""
    if density == 1:
        return {}
    histograms: dict[str, LogHistogram] = {}
    for site in sites:
        for name, change, v in zip(site.names, site.dense(), statistics_of(site, rule), strict=True):
            if v is not None:
                histograms.setdefault(name, LogHistogram()).add(saliency(change, v))
    return {name: histogram.threshold(density) for name, histogram in histograms.items()}


def grafted(
    rule: Rule, keep_norm: bool, site: Aligned, limits: dict[str, float]
) -> list[tuple[Tensor, Tensor | None]]:
    """Each model's masked change, and its mask, in the weight's shape, or None where it keeps everything."""
    found: list[tuple[Tensor, Tensor | None]] = []
    changes = zip(site.names, site.changes, site.dense(), statistics_of(site, rule), strict=True)
    for name, before, change, v in changes:
        if v is None or limits.get(name, 0.0) == 0:
            found.append((change, None))
            continue
        mask = saliency(change, v) >= limits[name]
        masked = change * mask
        found.append((rescaled(masked, before, site.matrix) if keep_norm else masked, mask))
    return found
