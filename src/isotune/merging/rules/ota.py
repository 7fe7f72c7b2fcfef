"""OTA: the mean of the changes, each entry weighted by the curvature that Adam saw there at the end of training.

    ΔW[k] = Σ w_i[k] ΔW_i[k] / Σ w_i[k],    w_i = c_i m_i (v_i^p + ε_i) / n_i

v_i is Adam's second moment, m_i the mask of `ffg` (1 unless `density` is less), ε_i is `eps` times the mean of v_i^p
in the weight, and n_i is 1, or the mean of v_i^p over the weight or over the model. Where every model is masked the
base stands. The authors' ε is absolute, so that the scale of v matters, and "fully masked" is where `Σ w` is about
T ε, which is so too where v is tiny; here it is where no mask has the entry. Their "global" is the mean over one
weight, and divides out the c_i as well.

Paper: "Harnessing Optimization Dynamics for Curvature-Informed Model Merging", 2025, arXiv 2509.11167. Its main
results take p = 0.5 with masks, and p = 1 without. Cost: a few passes over the dense changes and statistics. The
result has full rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from isotune.checkpoint.files import Statistic
from isotune.linalg.change import Change
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.by_statistic import plain_mean, statistics_of, weighted_mean
from isotune.merging.rules.ffg import grafted, thresholds


class _Surveyed(NamedTuple):
    means: dict[str, float]
    """Of v^p, over each model; empty where it is not needed."""
    thresholds: dict[str, float]


class OTA(Rule):
    """The mean of the changes, weighted entry by entry by a power of Adam's second moments."""

    name: ClassVar[str] = "ota"
    statistic: ClassVar[Statistic | None] = "second_moment"
    exact_rank: ClassVar[bool] = False

    power: float = Field(0.5, gt=0, le=2, description="The power p of the second moments.")
    eps: float = Field(1e-12, ge=0, description="Least weight, over the mean of v^p in the weight at hand.")
    normalise: Literal["none", "tensor", "model"] = Field(
        "none", description="Divide v^p by its mean: for models trained with other batch sizes or schedules."
    )
    density: float = Field(1.0, gt=0, le=1, description="Share of all changed entries of a model that stay; see ffg.")
    fallback: Literal["base", "mean"] = Field("base", description="What stands where no model keeps its entry.")
    keep_norm: bool = Field(False, description="Scale what stays to the operator norm that the change had.")

    def survey(self, sites: Iterable[Aligned]) -> _Surveyed:
        sums: dict[str, float] = {}
        entries: dict[str, int] = {}

        def walk() -> Iterable[Aligned]:
            for site in sites:
                for name, v in zip(site.names, statistics_of(site, self), strict=True):
                    if v is not None and self.normalise == "model":
                        sums[name] = sums.get(name, 0.0) + float(v.double().pow(self.power).sum())
                        entries[name] = entries.get(name, 0) + v.numel()
                yield site

        walked = walk()
        limits = thresholds(self, self.density, walked)
        for _ in walked:  # where no threshold was asked for, nothing has been walked
            pass
        return _Surveyed({name: total / entries[name] for name, total in sums.items()}, limits)

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        kept = grafted(self, self.keep_norm, site, surveyed.thresholds)
        changes = [change for change, _ in kept]
        weights, present = [], []
        for name, c, (change, mask), v in zip(site.names, site.weights, kept, statistics_of(site, self), strict=True):
            stays = torch.ones_like(change) if mask is None else mask.to(change.dtype)
            present.append(torch.zeros_like(change) if v is None else c * stays)
            weights.append(
                torch.zeros_like(change) if v is None else c * stays * self._weight(v, name, surveyed, change)
            )
        mean = plain_mean(site.dense(), site.weights) if self.fallback == "mean" else torch.zeros_like(changes[0])
        return weighted_mean(changes, weights, otherwise=weighted_mean(changes, present, otherwise=mean))

    def _weight(self, v: Tensor, name: str, surveyed: _Surveyed, change: Tensor) -> Tensor:
        raised = v.to(change.device).pow(self.power)
        mean = float(raised.double().mean())
        divisor = {"none": 1.0, "tensor": mean, "model": surveyed.means.get(name, 1.0)}[self.normalise]
        return ((raised + self.eps * mean) / (divisor if divisor > 0 else 1.0)).to(change.dtype)
