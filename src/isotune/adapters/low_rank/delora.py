"""DeLoRA, decoupled low-rank adaptation: a low-rank change whose size is one learned number, whatever its factors.

    W' = W + (λ / r) Σ_i (b_i / |b_i|) (a_i / |a_i|)ᵀ diag(ν),   ν_j = |column j of W|

with a_i the rows of A (r x in), b_i the columns of B (out x r), lengths below 1e-4 taken as 1e-4, and ν frozen, so
that the change, its columns measured by those of W, is never larger than λ (Frobenius).

Paper: "Decoupling Angles and Strength in Low-rank Adaptation", ICLR 2025, arXiv 2503.18225. Parameters:
r (in + out) + 1. Cost for n rows: 2 n r (in + out) flops.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank
from isotune.adapters.low_rank.lora import fresh_factors
from isotune.adapters.settings import Settings
from isotune.linalg.precision import at_least_fp32
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site

_SHORTEST = 1e-4


class DeLoRA(Settings):
    """W' = W + B diag(λ / (r |b_i| |a_i|)) A diag(|W_j|): a low-rank change of a learned size."""

    name: ClassVar[str] = "delora"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "rank * (n_in + n_out) + 1"
    dialect: ClassVar[str] = "isotune.adapters.peft.delora:DeLoRADialect"

    rank: int = Field(8, gt=0, description="Rank of W' - W.")
    boundary: float = Field(15.0, gt=0, description="Size of the change to start from; the paper's lambda.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A while training.")

    def build(self, site: Site, generator: torch.Generator) -> DeLoRAAdapter:
        columns = torch.linalg.vector_norm(at_least_fp32(site.weight), dim=0).cpu()
        return DeLoRAAdapter(*fresh_factors(site, self.rank, generator), self.boundary, columns, self.dropout)

    def shell(self, site: Site) -> DeLoRAAdapter:
        # The stored column lengths are about to come; W, which may be packed, is not asked for them.
        factors = fresh_factors(site, self.rank, torch.Generator())
        return DeLoRAAdapter(*factors, self.boundary, torch.zeros(site.in_features), self.dropout)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features) + 1


class DeLoRAAdapter(LowRank):
    """Holds A (r x in), B (out x r), `lambda` (1), and the lengths of W's columns at the start, `w_norm` (in)."""

    method = "delora"
    w_norm: Tensor

    def __init__(self, A: Tensor, B: Tensor, boundary: float, w_norm: Tensor, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_parameter("lambda", nn.Parameter(torch.tensor([boundary])))
        self.register_buffer("w_norm", w_norm)

    def change(self) -> tuple[Tensor, Tensor]:
        lengths = torch.linalg.vector_norm(self.A, dim=1).clamp_min(_SHORTEST)
        lengths = lengths * torch.linalg.vector_norm(self.B, dim=0).clamp_min(_SHORTEST)
        return self.B * (getattr(self, "lambda") / (len(lengths) * lengths)), self.A * self.w_norm
