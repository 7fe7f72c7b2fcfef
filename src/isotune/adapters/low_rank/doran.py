"""DoRAN: DoRA with a learned number added to the row norms, which keeps the division away from zero.

    W' = diag(m / (g + τ)) (W + s B A),   g_i = |w_i + s b_i A|,   τ > 0 trained,   m = |w_i| + τ at the start

Paper: "DoRAN: Stabilizing Weight-Decomposed Low-Rank Adaptation via Noise Injection and Auxiliary Networks", 2025,
arXiv 2510.04331. Parameters: r (in + out) + out + 1, or + 2 out with one τ for each row. Cost: DoRA's.

Two things are ours, for no code is public: τ = softplus(t), and its start. The paper also makes A and B by small
networks that several layers share; that is left out: A and B are each layer's own.
τ -> 0 is DoRA; for τ far above g the rows are no longer normalised: W' = diag(m / τ) (W + s B A). A zero row of W,
which DoRA cannot bring back, trains like any other.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.low_rank.dora import DoRA
from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.adapters.low_rank.row_scaled import RowScaledAdapter
from isotune.sites import Site


class DoRAN(DoRA):
    """W' = diag(m / (|W + s B A| + τ)) (W + s B A): DoRA with a learned number in the denominator."""

    name: ClassVar[str] = "doran"
    formula: ClassVar[str] = "rank * (n_in + n_out) + n_out + 1"
    dialect: ClassVar[str] = ""

    tau: float = Field(0.1, gt=0, description="The number to start from, to compare with the lengths of W's rows.")
    tau_per_row: bool = Field(False, description="Learn one number for each row, in place of one for the layer.")

    def scaled(self, product: LoRAAdapter, norms: Tensor) -> RowScaledAdapter:
        # The inverse of softplus, without overflow.
        t = torch.full((len(norms) if self.tau_per_row else 1,), self.tau + math.log(-math.expm1(-self.tau)))
        return DoRANAdapter(product, norms + F.softplus(t), t, self.detach_norm)

    def parameter_count(self, site: Site) -> int:
        return super().parameter_count(site) + (site.out_features if self.tau_per_row else 1)


class DoRANAdapter(RowScaledAdapter):
    """Holds A (r x in), B (out x r), m (out), and t (1 or out) with τ = softplus(t)."""

    method = "doran"

    def __init__(self, product: LoRAAdapter, magnitude: Tensor, t: Tensor, detach_norm: bool = True) -> None:
        super().__init__(product, magnitude, detach_norm)
        self.t = nn.Parameter(t)

    def scaling(self, norms: Tensor) -> Tensor:
        return self.magnitude / (norms + F.softplus(self.t))
