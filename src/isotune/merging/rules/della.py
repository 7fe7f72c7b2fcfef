"""DELLA: drop entries at random, small ones more often, and rescale; then elect signs and average.

    p_ij = density + ε (2 (rank of |ΔW_ij| in its row - 1) / (in - 1) - 1)        kept with that probability
    τ = m ∘ ΔW / p,    m ~ Bernoulli(p),    E τ = ΔW

then the disjoint mean of TIES, or with `signs` off the weighted sum. Deep, Bhardwaj and Poria, "DELLA-merging:
reducing interference in model merging through magnitude-based sampling" (2024, arXiv 2406.11617). Entries of the
same magnitude are ranked by their place. Cost: one walk over T dense changes, with every row sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from isotune.errors import OptionError
from isotune.merging.contract import Aligned
from isotune.merging.rules.families.entrywise import UNBIASED, Elected, Step, drawn, sum_of


class DELLA(Elected):
    """Drop random entries of the changes, small ones more often, then average the models that agree on a sign."""

    name: ClassVar[str] = "della"
    random: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any]] = {"density": 1.0, "epsilon": 0.0}

    density: float = Field(0.5, gt=0, le=1, description="Mean probability with which an entry is kept.")
    epsilon: float = Field(
        0.15, ge=0, lt=1, description="How much it is less for a row's smallest, more for its largest."
    )
    unbiased: bool = Field(True, description=UNBIASED)
    signs: bool = Field(True, description="Elect signs and average; else the weighted sum.")

    @model_validator(mode="after")
    def _probabilities_are_possible(self) -> DELLA:
        least, most = self.density - self.epsilon, self.density + self.epsilon
        if least <= 0 or most > 1:
            raise OptionError(
                f"della: density={self.density:g} and epsilon={self.epsilon:g} give probabilities from {least:g} to "
                f"{most:g}; they must be above 0 and at most 1: use epsilon below "
                f"{min(self.density, 1 - self.density):g}, or another density"
            )
        return self

    def steps(self, site: Aligned, surveyed: Any) -> Sequence[Step]:
        return [partial(self._sparse, generator=site.generator(name)) for name in site.names]

    def combine(self, blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return super().combine(blocks, weights) if self.signs else sum_of(blocks, weights)

    def _sparse(self, x: Tensor, generator: torch.Generator) -> Tensor:
        columns = x.shape[1]
        reach = self.epsilon if columns > 1 else 0.0
        ramp = torch.linspace(
            self.density - reach, self.density + reach, columns, dtype=torch.float32, device=x.device
        )
        keep = torch.empty_like(x, dtype=torch.float32).scatter_(1, ascending(x), ramp.expand_as(x))
        return drawn(x, keep, generator, self.unbiased)


def ascending(x: Tensor) -> Tensor:
    """The columns of x (b, in) in the order of |x| (in fp32) in each row; equal ones as they stand."""
    # One sort of whole numbers, magnitude first and column last: NumPy's is ten times as fast as torch's of floats.
    keys = x.abs().float().contiguous().view(torch.int32).long() << 32
    keys |= torch.arange(x.shape[1], device=x.device)
    ordered = torch.from_numpy(np.sort(keys.cpu().numpy(), axis=1))
    return (ordered & 0xFFFFFFFF).to(x.device)
