"""What the rules that weigh the single entries of a weight by a statistic have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.change import Change, dense, size
from isotune.linalg.low_rank import Factored, singular_values
from isotune.linalg.spectral_norm import spectral_norm
from isotune.merging.contract import Aligned, Rule
from isotune.statistics.stored import missing

BINS, LOWEST, HIGHEST = 2**16, -256, 256


def statistics_of(site: Aligned, rule: Rule) -> list[Tensor | None]:
    """Each model's statistic, in the weight's shape; None for a model that left the weight alone, and has no say.

    Raises OptionError where a model changed the weight and has none, and for a negative weight of a model.
    """
    if min(site.weights) < 0:
        raise OptionError(f"{rule.name} is a weighted mean: its weights are 0 or more, not {min(site.weights):g}")
    found = list(site.statistics) or [None] * len(site.names)
    for name, change, own in zip(site.names, site.changes, found, strict=True):
        if own is None and size(change) > 0:
            raise missing(rule.name, str(rule.statistic), name, site.path)
    return found


def weighted_mean(changes: Sequence[Tensor], weights: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """`Σ w_i ΔW_i / Σ w_i`, all of one shape, for weights of 0 or more; `otherwise` where all of them are 0."""
    above, below = torch.zeros_like(otherwise), torch.zeros_like(otherwise)
    for change, w in zip(changes, weights, strict=True):
        above += w * change
        below += w
    return torch.where(below > 0, above / below, otherwise)


def plain_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ c_i ΔW_i / Σ c_i` of changes of one shape; zero where the weights are."""
    first, total = torch.zeros_like(changes[0]), sum(weights)
    return sum((c / total * change for change, c in zip(changes, weights, strict=True) if total > 0), first)


class LogHistogram:
    """How many numbers there are of each size, by their binary logarithm in 65,536 bins, each 0.5 % wide.

    From 2⁻²⁵⁶ to 2²⁵⁶; what is smaller, such as 0, is in the first bin. Finds quantiles over a whole model, of which
    no more than one weight is ever in memory.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count the entries of a tensor of any shape, all 0 or more."""
        places = ((values.double().flatten().log2() - LOWEST) * (BINS / (HIGHEST - LOWEST))).clamp(0, BINS - 1)
        self.counts += torch.bincount(places.long(), minlength=BINS).cpu()

    def threshold(self, share: float) -> float:
        """The largest edge of a bin with at least that share of all numbers at or above it; 0 for all of them."""
        above = self.counts.flip(0).cumsum(0).flip(0)
        reached = int((above >= share * above[0]).sum()) - 1
        return 2.0 ** (LOWEST + reached * (HIGHEST - LOWEST) / BINS) if reached > 0 else 0.0


def saliency(change: Tensor, v: Tensor) -> Tensor:
    """`v ΔW²`, both of one shape, in float64 (fp32 may be too coarse): about what taking an entry back would cost."""
    return v.to(change.device).double() * change.double().square()


def rescaled(masked: Tensor, before: Change, matrix: bool) -> Tensor:
    """The masked change, in its shape, scaled to the operator norm of what it was `before`; zeros stay.

    For a matrix the largest singular value, for another tensor of two dimensions (an embedding) its longest row, and
    else the Euclidean norm.
    """
    now = _operator_norm(masked, matrix)
    return masked * (_operator_norm(before, matrix) / now) if now > 0 else masked


def _operator_norm(change: Change, matrix: bool) -> float:
    if matrix and isinstance(change, Factored):
        return float(singular_values(*change)[0]) if change.rank else 0.0
    full = dense(change)
    if matrix:
        return spectral_norm(full)
    return float(torch.linalg.vector_norm(full, dim=1).max() if full.dim() == 2 else full.norm())
