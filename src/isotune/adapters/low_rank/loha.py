"""LoHa, low-rank Hadamard product: two low-rank products, multiplied entry by entry.

    W' = W + s (B_1 A_1) ∘ (B_2 A_2),   B_i (out x r), A_i (r x in),   s = alpha / r,   A_2 = 0 at the start

The change has a rank of up to r²: it is a LoRA of that rank, `B = s B_1 ⊙ B_2` and `A = A_1 ⊙ A_2`, with all products
of a column of one and a column of the other (of rows for A).

Paper: "FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022,
arXiv 2108.06098; LyCORIS made an adapter of it. Parameters: 2 r (in + out). Cost for n rows: 2 n r² (in + out) flops,
or 4 r in out for the weight where that is less.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, Parts
from isotune.adapters.settings import Settings
from isotune.linalg.random_bases import uniform
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class LoHa(Settings):
    """W' = W + s (B_1 A_1) ∘ (B_2 A_2): the weight plus the entrywise product of two products of rank r."""

    name: ClassVar[str] = "loha"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "2 * rank * (n_in + n_out)"
    dialect: ClassVar[str] = "isotune.adapters.peft.lycoris:LoHaDialect"

    rank: int = Field(8, gt=0, description="Rank of each of the two products; the change has up to its square.")
    alpha: float | None = Field(None, gt=0, description="Scaling numerator; the default is the rank, so that s = 1.")

    @property
    def resolved_alpha(self) -> float:
        """The scaling numerator, with the default filled in."""
        return self.alpha or float(self.rank)

    def build(self, site: Site, generator: torch.Generator) -> LoHaAdapter:
        into, out = 1 / math.sqrt(site.in_features), 1 / math.sqrt(self.rank)
        B1, B2 = (uniform((site.out_features, self.rank), out, generator) for _ in range(2))
        A1 = uniform((self.rank, site.in_features), into, generator)
        return LoHaAdapter(B1, A1, B2, torch.zeros_like(A1), self.resolved_alpha / self.rank)

    def parameter_count(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + site.out_features)


class LoHaAdapter(LowRank):
    """Holds B1 and B2 (out x r), A1 and A2 (r x in)."""

    method = "loha"
    parts: Parts = MappingProxyType({"B1": "B", "B2": "B", "A1": "A", "A2": "A"})

    def __init__(self, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.B1, self.A1, self.B2, self.A2 = map(nn.Parameter, (B1, A1, B2, A2))
        self.scale = scale

    def change(self) -> tuple[Tensor, Tensor]:
        B = self.scale * torch.einsum("ok,ol->okl", self.B1, self.B2).flatten(1)
        return B, torch.einsum("ki,li->kli", self.A1, self.A2).flatten(0, 1)

    def weight(self, W: Tensor) -> Tensor:
        with without_autocast(W):
            product = torch.mul(self.B1 @ self.A1, self.B2 @ self.A2)
            return torch.add(W, product.to(W.dtype), alpha=self.scale)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        out, into = site.out_features, site.in_features
        r = self.A1.shape[0]
        thin = site.rows(x) * r * r * (into + out)
        if site.packed or thin <= 2 * r * into * out + site.rows(x) * into * out:
            return super().forward(x, site)
        return self.reference(x, site)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        own = {"hada_w1_a": self.B1, "hada_w1_b": self.A1, "hada_w2_a": self.B2, "hada_w2_b": self.A2}
        return {name: parameter.detach() for name, parameter in own.items()}
