"""KAdaptation: a change of the weight by Kronecker products of rules that all layers share, and thin factors of each.

    W' = W + s Σ_i (t_i sᵢᵀ) ⊗ (v_i u_iᵀ),   s_i, t_i (n) shared, u_i (in/n x k), v_i (out/n x k), i = 1 ... n

that is a LoRA of rank n k, whose rows are s_i ⊗ u_i and whose columns t_i ⊗ v_i. v starts at zero; in the authors'
code u and v both do, where no gradient reaches either.

Paper: "Parameter-efficient Model Adaptation for Vision Transformers", AAAI 2023, arXiv 2203.16329, which has rules
for queries and rules for values, and k = 1. Parameters: 2 n² in all, and k (in + out) for each layer. Cost for a row:
2 r (in + out) flops at r = n k. The paper's factor of 160 belongs to rules that start at 0.01; here they start at
1 / √n, and s at one.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, Parts, check_tensors
from isotune.adapters.settings import Settings
from isotune.adapters.shared import Shared
from isotune.errors import OptionError
from isotune.linalg.random_bases import uniform
from isotune.sites import LINEAR, Site


class KAdaptation(Settings):
    """W' = W + s Σ_i (t_i s_iᵀ) ⊗ (v_i u_iᵀ): Kronecker products of shared rules and thin factors."""

    name: ClassVar[str] = "kadaptation"
    kinds: ClassVar[frozenset[str]] = LINEAR
    learning_rate: ClassVar[float] = 3e-2
    formula: ClassVar[str] = "rank * (n_in + n_out)"
    trains_shared: ClassVar[bool] = True

    rank: int = Field(1, gt=0, description="Columns of a layer's own factors; the paper's k.")
    parts: int = Field(8, gt=1, description="Parts of a side, and how many products there are; the paper has 32.")
    scale: float = Field(1.0, gt=0, description="Factor on the change; the paper's s.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the rules that all layers share.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the inputs of the change while training.")

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        draw, n = torch.Generator().manual_seed(self.seed), self.parts
        return {f"kadaptation_{side}": uniform((n, n), n**-0.5, draw) for side in ("s", "t")}

    def build(self, site: Site, generator: torch.Generator) -> KAdaptationAdapter:
        n_in, n_out, n = site.in_features, site.out_features, self.parts
        if n_in % n or n_out % n:
            raise OptionError(f"parts={n} does not divide a layer of {n_in} inputs and {n_out} outputs evenly")
        u = uniform((n, self.rank, n_in // n), (n / n_in) ** 0.5, generator)
        return KAdaptationAdapter(u, torch.zeros(n, self.rank, n_out // n), self.scale, self.dropout)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


class KAdaptationAdapter(LowRank):
    """Holds u (n x k x in/n) and v (n x k x out/n)."""

    method = "kadaptation"
    parts: Parts = MappingProxyType({"u": "matrices", "v": "matrices"})

    def __init__(self, u: Tensor, v: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.u, self.v, self.scale = nn.Parameter(u), nn.Parameter(v), scale

    def share(self, shared: Shared) -> None:
        self.shared = shared
        n = len(self.u)
        check_tensors(shared.tensors(), {f"kadaptation_{side}": (n, n) for side in ("s", "t")})

    def change(self) -> tuple[Tensor, Tensor]:
        s, t = self.shared["kadaptation_s"], self.shared["kadaptation_t"]
        A = torch.einsum("ia,ikp->ikap", s, self.u).flatten(2).flatten(0, 1)
        B = torch.einsum("ia,ikp->ikap", t, self.v).flatten(2).flatten(0, 1)
        return self.scale * B.mT, A
