"""LoLDU: only r pivots of the weight's LDU decomposition and one scalar are trained.

    W = P L D U  (partial pivoting, unit diagonals),   W' = W + P L_r diag(σ z - σ_0 z_0) U_r

with the first r columns of L and rows of U, both frozen, z starting as the first r pivots z_0 and σ as
σ_0 = alpha / rank. The weight itself stays untouched: the change has rank at most r, as the paper's
`W_res + σ P L_r diag(z) U_r` has from W, without a residual to keep.

Paper: "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", 2024,
arXiv 2410.13618. Parameters: r + 1; r (in + out) frozen numbers are kept and stored beside them.
Cost for n rows: 2 n r (in + out) flops, LoRA's; at the start 2 r² (in + out).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank
from isotune.adapters.settings import Settings, check_rank
from isotune.linalg.ldu import leading_ldu
from isotune.linalg.precision import at_least_fp32
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site

Start = Literal["lu", "uniform", "constant", "ones", "zeros"]


class LoLDU(Settings):
    """W' = W + P L_r diag(σ z - σ_0 z_0) U_r: learned pivots between the weight's own triangles."""

    name: ClassVar[str] = "loldu"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank + 1"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "it starts from the weight's own decomposition; nothing is drawn"
    }

    rank: int = Field(
        16, gt=0, description="Number of pivots trained; the rank of W' - W. The paper takes several hundred."
    )
    alpha: float = Field(8.0, gt=0, description="Numerator of the scalar's start, alpha / rank.")
    start: Start = Field(
        "lu",
        description="Pivots at the start: lu, the weight's own, the identity. The paper's others change the model: "
        "uniform within half their mean around zero; constant, their mean; ones; zeros.",
    )

    @property
    def identity_at_start(self) -> bool:
        return self.start == "lu"

    def build(self, site: Site, generator: torch.Generator) -> LoLDUAdapter:
        self._check(site)
        factors = leading_ldu(at_least_fp32(site.weight), self.rank)
        PL, D, U = (t.float().cpu().clone(memory_format=torch.contiguous_format) for t in factors)
        z, mean = D.clone(), float(D.mean())
        if self.start == "uniform":
            z = mean * (torch.rand(self.rank, generator=generator) - 0.5)
        elif self.start != "lu":
            z = torch.full_like(D, {"constant": mean, "ones": 1.0, "zeros": 0.0}[self.start])
        return LoLDUAdapter(z, D, PL, U, self.alpha / self.rank)

    def shell(self, site: Site) -> LoLDUAdapter:
        self._check(site)
        z, PL = torch.zeros(self.rank), torch.zeros(site.out_features, self.rank)
        return LoLDUAdapter(z, z.clone(), PL, torch.zeros(self.rank, site.in_features))

    def _check(self, site: Site) -> None:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")

    def parameter_count(self, site: Site) -> int:
        return self.rank + 1


class LoLDUAdapter(LowRank):
    """Holds z (r) and σ (scalar), and frozen their starts and the triangles P L_r (out x r) and U_r (r x in)."""

    method = "loldu"
    PL: Tensor
    U: Tensor
    first_z: Tensor
    first_sigma: Tensor

    def __init__(self, z: Tensor, first_z: Tensor, PL: Tensor, U: Tensor, sigma: float = 1.0) -> None:
        super().__init__()
        self.z, self.sigma = nn.Parameter(z), nn.Parameter(torch.tensor(sigma))
        self.register_buffer("first_z", first_z)
        self.register_buffer("first_sigma", torch.tensor(sigma))
        self.register_buffer("PL", PL)
        self.register_buffer("U", U)

    def change(self) -> tuple[Tensor, Tensor]:
        return self.PL * (self.sigma * self.z - self.first_sigma * self.first_z), self.U
