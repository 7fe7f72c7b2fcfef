"""Hydra: one low-rank branch beside the layer, as in LoRA, and one behind it, which reads the layer's own output.

    z = W x + b,   y = z + s B_p A_p x + s B_s A_s z

    W' = W + s B_p A_p + s B_s A_s W,   b' = b + s B_s A_s b

with A_p (r_p x in), B_p (out x r_p), A_s (r_s x out), B_s (out x r_s).

Paper: "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", 2023, arXiv 2309.06922.
Parameters: r_p (in + out) + 2 r_s out. Cost for n rows: 2 n (r_p (in + out) + 2 r_s out) flops.
The weight's change is a LoRA of rank r_p + r_s; the bias changes with it, so that only a layer without one exports.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts, WeightAdapter
from isotune.adapters.low_rank.lora import fresh_factors
from isotune.adapters.settings import Settings, check_rank
from isotune.errors import OptionError
from isotune.linalg.precision import at_least_fp32, autocast
from isotune.linalg.random_bases import uniform
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class Hydra(Settings):
    """W' = W + s B_p A_p + s B_s A_s W: a low-rank branch beside the layer and one behind it."""

    name: ClassVar[str] = "hydra"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + 3 * n_out)"

    rank: int = Field(4, gt=0, description="Rank of the branch beside the layer.")
    sequential_rank: int | None = Field(
        None, gt=0, description="Rank of the branch behind it; the default is `rank`."
    )
    scale: float = Field(1.0, gt=0, description="Factor on both branches; the paper's s, chosen for each task.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout between the two factors of a branch while training.")

    def build(self, site: Site, generator: torch.Generator) -> HydraAdapter:
        if not site.rotates_output:
            raise OptionError(
                "the branch behind the layer mixes all of its outputs, which a convolution with groups="
                f"{site.layer.groups} keeps apart; leave this layer out, with exclude=..."
            )
        out, rank = site.out_features, self.sequential_rank or self.rank
        check_rank(rank, out, "its output side")
        parallel = fresh_factors(site, self.rank, generator)
        sequential = uniform((rank, out), 1 / math.sqrt(out), generator), torch.zeros(out, rank)
        return HydraAdapter(parallel, sequential, self.scale, self.dropout)

    def parameter_count(self, site: Site) -> int:
        return (
            self.rank * (site.in_features + site.out_features)
            + 2 * (self.sequential_rank or self.rank) * site.out_features
        )


class HydraAdapter(WeightAdapter):
    """Holds A_p (r_p x in), B_p (out x r_p), A_s (r_s x out) and B_s (out x r_s)."""

    method = "hydra"
    parts: Parts = MappingProxyType({"A_p": "A", "A_s": "A", "B_p": "B", "B_s": "B"})

    def __init__(
        self,
        parallel: tuple[Tensor, Tensor],
        sequential: tuple[Tensor, Tensor],
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.A_p, self.B_p = map(nn.Parameter, parallel)
        self.A_s, self.B_s = map(nn.Parameter, sequential)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        x, z = autocast(x), site(x)
        with without_autocast(z):
            # Both branches at once from here on: one product of the size of the output.
            low = torch.cat([site.project(x, self.A_p).to(z.dtype), site.expand(z, self.A_s)], site.features)
            change = site.expand(self.dropout(low), torch.cat([self.B_p, self.B_s], dim=1))
        return torch.add(z, change, alpha=self.scale)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        B = self.scale * torch.cat([self.B_p, self.B_s], dim=1).to(W.dtype)
        return B, torch.cat([self.A_p.to(W.dtype), self.A_s.to(W.dtype) @ W])

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.factors(W)
        return W + B @ A

    def bias(self, b: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        wide = at_least_fp32(b)
        A, B = self.A_s.to(wide.dtype), self.B_s.to(wide.dtype)
        return (wide + self.scale * (B @ (A @ wide))).to(b.dtype)
