"""PEGO, a parameter-efficient group with orthogonal regularisation: several LoRAs that stay apart, and apart from W.

    W' = W + Σ_i B_i A_i,   penalty  λ (Σ_i |W D_iᵀ| + Σ_{i<j} |D_i D_jᵀ|),   D_i = B_i A_i

over N LoRAs of rank r, for domains not seen in training: what the model knew is kept by orthogonality to the rows of
W, and the LoRAs learn different things. |.| is the sum of absolute entries ("entrywise", the paper's), which needs
out x out products, or the squared Frobenius norm, which needs none larger than r x out. A penalty of all entries
grows with the layer: `mean` divides by their number. Where the rows of W span all inputs, no D but zero is orthogonal
to them, so that λ weighs how far the model may go.

Paper: "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
Generalization", ECCV 2024, arXiv 2407.15085. Parameters: N r (in + out). Cost for n rows: 2 n N r (in + out) flops,
and 2 in out N r for the penalty, with 2 N out² r in its entrywise form. It is one LoRA of rank N r.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, Parts
from isotune.adapters.low_rank.lora import fresh_factors
from isotune.adapters.settings import Settings, check_rank
from isotune.linalg.low_rank import wide_product
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class PEGO(Settings):
    """W' = W + Σ_i B_i A_i: LoRAs kept orthogonal to W and to each other by a penalty."""

    name: ClassVar[str] = "pego"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 7e-3
    formula: ClassVar[str] = "4 * rank * (n_in + n_out)"

    rank: int = Field(4, gt=0, description="Rank of each LoRA.")
    count: int = Field(4, gt=0, description="How many LoRAs there are; the paper's N.")
    penalty: float = Field(1e-3, ge=0, description="Weight of the penalty at each layer; the paper's lambda.")
    norm: Literal["entrywise", "frobenius"] = Field(
        "entrywise", description="Sums of absolute values (paper), or squared Frobenius norms, which cost less."
    )
    mean: bool = Field(False, description="Divide by the number of entries, so that the weight suits any width.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the inputs of the change while training.")

    def build(self, site: Site, generator: torch.Generator) -> PEGOAdapter:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        drawn = [fresh_factors(site, self.rank, generator) for _ in range(self.count)]
        A, B = (torch.stack(factors) for factors in zip(*drawn, strict=True))
        return PEGOAdapter(A, B, self)

    def parameter_count(self, site: Site) -> int:
        return self.count * self.rank * (site.in_features + site.out_features)


class PEGOAdapter(LowRank):
    """Holds A (N x r x in) and B (N x out x r)."""

    method = "pego"
    parts: Parts = MappingProxyType({"A": "matrices", "B": "matrices"})

    def __init__(self, A: Tensor, B: Tensor, settings: PEGO) -> None:
        super().__init__(settings.dropout)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.settings = settings

    def change(self) -> tuple[Tensor, Tensor]:
        return self.B.transpose(0, 1).flatten(1), self.A.flatten(0, 1)

    def penalty(self, site: Site) -> Tensor:
        if not self.settings.penalty:
            return super().penalty(site)
        with without_autocast(self.A):
            W = site.weight.detach()
            out = W.shape[0]
            # W D_iᵀ = (W A_iᵀ) B_iᵀ and D_i D_jᵀ = B_i (A_i A_jᵀ) B_jᵀ: never wider than what is asked for.
            left = wide_product(W, self.A.flatten(0, 1).mT).view(out, *self.A.shape[:2]).transpose(0, 1)
            first, second = torch.triu_indices(len(self.A), len(self.A), offset=1, device=self.A.device)
            between = self.B[first] @ (self.A[first] @ self.A[second].mT)
            size = _absolute if self.settings.norm == "entrywise" else _squared
            total = size(left, self.B) + size(between, self.B[second])
        return self.settings.penalty * (total / out**2 if self.settings.mean else total)


def _absolute(L: Tensor, R: Tensor) -> Tensor:
    """The sum of the absolute entries of L_i R_iᵀ, for L and R (k, out, r)."""
    return (L @ R.mT).abs().sum()


def _squared(L: Tensor, R: Tensor) -> Tensor:
    """The sum of `|L_i R_iᵀ|²`, Frobenius, for L and R (k, out, r): by r x r products."""
    return ((L.mT @ L) * (R.mT @ R)).sum()
