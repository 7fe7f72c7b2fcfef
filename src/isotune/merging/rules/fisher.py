"""The mean of the changes, each entry weighted by how much each model knows of it: its Fisher information.

    ΔW[k] = Σ c_i F_i[k] ΔW_i[k] / Σ c_i F_i[k],    c_i = w_i / |F_i|

It maximises the product of the models' posteriors, each a Gaussian with the diagonal precision F_i around the model
(Laplace's approximation). |F_i| is the norm over all weights of the model. Every F_i is at least `floor` times its
own root mean square; the authors' floor of 1e-6 is absolute, so that scaling an F changes the result.

Paper: "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832. Cost: a few passes over the
dense changes and statistics. The result has full rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from isotune.checkpoint.files import Statistic
from isotune.errors import OptionError, nearest
from isotune.linalg.change import Change
from isotune.merging.contract import Aligned, Rule
from isotune.merging.rules.families.by_statistic import plain_mean, statistics_of, weighted_mean


@dataclass
class _Size:
    """Over all weights of a model: the sum of squares of its Fisher information, and how many there are."""

    squares: float = 0.0
    entries: int = 0


class Fisher(Rule):
    """The mean of the changes, weighted entry by entry by the models' Fisher information."""

    name: ClassVar[str] = "fisher"
    statistic: ClassVar[Statistic | None] = "fisher"
    exact_rank: ClassVar[bool] = False

    floor: float = Field(1e-6, ge=0, description="Least information, over the root mean square of a model's own.")
    normalize: bool = Field(True, description="Divide every model's information by its norm over the whole model.")
    favor: str | None = Field(
        None, description="The model whose values stand where none has information: only it has the floor."
    )

    def survey(self, sites: Iterable[Aligned]) -> dict[str, _Size]:
        sizes: dict[str, _Size] = {}
        for site in sites:
            if self.favor is not None and self.favor not in site.names:
                raise OptionError(
                    f"fisher: favor={self.favor!r} is none of the models.{nearest(self.favor, site.names)} "
                    f"They are: {', '.join(site.names)}."
                )
            for name, own in zip(site.names, statistics_of(site, self), strict=True):
                if own is not None:
                    size = sizes.setdefault(name, _Size())
                    size.squares += float(own.double().square().sum())
                    size.entries += own.numel()
        return sizes

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        changes, weights = site.dense(), []
        for name, c, change, own in zip(site.names, site.weights, changes, statistics_of(site, self), strict=True):
            size = surveyed.get(name, _Size())
            norm = size.squares**0.5
            least = self.floor * (size.squares / max(size.entries, 1)) ** 0.5
            least = least if self.favor in (None, name) else 0.0
            F = change.new_zeros(change.shape) if own is None else own.to(change.device).clamp(min=least)
            weights.append((F * (c / norm if self.normalize and norm > 0 else c)).to(change.dtype))
        return weighted_mean(changes, weights, otherwise=plain_mean(changes, site.weights))
