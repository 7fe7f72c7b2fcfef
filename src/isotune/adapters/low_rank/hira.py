"""HiRA, Hadamard high-rank adaptation: every entry of the weight scaled, by factors that have a low rank.

    W' = W ∘ (1 + B A),   B (out x r), A (r x in),   B = 0 at the start

so that the change W ∘ (B A) has a rank of up to r times that of W, and zeros of W stay. There is no scaling. It is no
LoRA, which would need that rank.

Paper: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025,
https://openreview.net/forum?id=TwJrTz9cRS. Parameters: r (in + out). Cost: 2 r in out flops for the weight, which is
formed once in each pass.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts, WeightAdapter
from isotune.adapters.low_rank.lora import fresh_factors
from isotune.adapters.settings import Settings, check_rank
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class HiRA(Settings):
    """W' = W ∘ (1 + B A): every entry of the weight scaled by a product of rank r."""

    name: ClassVar[str] = "hira"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 5e-2
    formula: ClassVar[str] = "rank * (n_in + n_out)"
    dialect: ClassVar[str] = "isotune.adapters.peft.hira:HiRADialect"

    rank: int = Field(32, gt=0, description="Rank of the factors on the weight.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the inputs of the change while training.")

    def build(self, site: Site, generator: torch.Generator) -> HiRAAdapter:
        return HiRAAdapter(*fresh_factors(site, self.rank, generator), self.dropout)

    def check(self, site: Site) -> None:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")

    def shell(self, site: Site) -> HiRAAdapter:
        A, B = torch.zeros(self.rank, site.in_features), torch.zeros(site.out_features, self.rank)
        return HiRAAdapter(A, B, self.dropout)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


class HiRAAdapter(WeightAdapter):
    """Holds A (r x in) and B (out x r)."""

    method = "hira"
    parts: Parts = MappingProxyType({"A": "A", "B": "B"})

    def __init__(self, A: Tensor, B: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.dropout = nn.Dropout(dropout)

    def weight(self, W: Tensor) -> Tensor:
        # As W + W ∘ (B A): half precision holds what is close to one too coarsely.
        with without_autocast(W):
            return torch.addcmul(W, W, (self.B @ self.A).to(W.dtype))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not (self.training and self.dropout.p and x.is_floating_point()):
            return super().forward(x, site)
        with without_autocast(site.weight):
            change = site.weight * (self.B @ self.A).to(site.weight.dtype)
        return site(x) + site.forward_with(self.dropout(x), change, None)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        A, B = self.A.detach(), self.B.detach()
        if site.kind == "embedding":
            return {"hira_embedding_A": A, "hira_embedding_B": B}
        if site.kind in CONVOLUTIONS:
            return {"hira_A": site.layout(A), "hira_B": site.pointwise(B)}
        return {"hira_A": A, "hira_B": B}
