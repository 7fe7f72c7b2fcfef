"""MiSS, matrix shard sharing: all shards of r inputs share one matrix. Published before as Bone and as DiSHA.

    y = W x + Dᵀ Σ_j x_[j],   D (r x out), x_[j] the j-th shard of r inputs (zeros fill the last)
    W' = W + Dᵀ [I_r I_r ... ]                     a LoRA of rank r whose A is known and not trained

With `mini` D is a narrower matrix (r x mini), repeated along the outputs.

Paper: "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024, arXiv 2409.15371
(first versions: "Bone", "DiSHA"). Parameters: r out, or r mini.
Cost for n rows: n in additions and 2 n r out flops, half of LoRA's.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, Parts, Treatment
from isotune.adapters.settings import Settings, check_rank
from isotune.errors import OptionError
from isotune.linalg.shards import shard_columns, shard_sum
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class MiSS(Settings):
    """W' = W + Dᵀ [I I ... I]: one matrix D, shared by all shards of the inputs."""

    name: ClassVar[str] = "miss"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.miss:MiSSDialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "D starts at zero; nothing is drawn"}

    rank: int = Field(64, gt=0, description="Width of a shard of inputs; the rank of W' - W.")
    mini: int | None = Field(
        None, gt=0, description="Width of D, repeated along the outputs; by default all of them."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the inputs of D while training.")

    def build(self, site: Site, generator: torch.Generator) -> MiSSAdapter:
        check_rank(self.rank, site.in_features, "its input side")
        width = self.mini or site.out_features
        if site.out_features % width:
            raise OptionError(
                f"miss: mini={width} does not divide the layer's {site.out_features} outputs; choose a divisor of "
                "them, or leave mini out"
            )
        return MiSSAdapter(torch.zeros(self.rank, width), site.in_features, site.out_features, self.dropout)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (self.mini or site.out_features)


class MiSSAdapter(LowRank):
    """Holds the block D (r x out, or r x mini)."""

    method = "miss"
    parts: Parts = MappingProxyType({"block": "matrix"})

    def __init__(self, block: Tensor, n_in: int, n_out: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.block = nn.Parameter(block)
        self.n_in, self.n_out = n_in, n_out

    def parameter_groups(self) -> dict[str, Treatment]:
        # A number of D stands for n_in / r of the change: |ΔW| / |W| of a step goes with the root of n_in.
        return {"block": Treatment(rate=math.sqrt(384 / self.n_in))}

    def change(self) -> tuple[Tensor, Tensor]:
        r, width = self.block.shape
        return self.block.repeat(1, self.n_out // width).mT, shard_columns(r, self.n_in, self.block)

    def add(self, site: Site, x: Tensor, y: Tensor | None = None) -> Tensor:
        if not site.rotates_input:
            return super().add(site, x, y)
        r, width = self.block.shape
        y = site(x) if y is None else y
        z = site.expand(shard_sum(x.to(y.dtype), r), self.block.mT)
        return (y.unflatten(-1, (-1, width)) + z[..., None, :].to(y.dtype)).flatten(-2)
