"""BAT, block affine transformation: every r x r block of W is multiplied and shifted by the matrix of its rows.

    W'_pq = W_pq (I + B_p) + B_p,   B_p (r x r), one for each block of r outputs

The variant of Bone and MiSS that is not low-rank. With fewer rows than r it runs on activations, without W':

    y_p = Σ_q W_pq (I + B_p) x_q + B_p Σ_q x_q

Paper: "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024, arXiv 2409.15371
(section "Bat" of the first versions, titled "Bone"). Parameters: r out.
Cost for n rows: 2 r in out flops for W', or 2 n in out beside the layer's own, whichever is less.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts, Treatment, WeightAdapter
from isotune.adapters.settings import Settings
from isotune.errors import OptionError, TargetError
from isotune.linalg.precision import autocast
from isotune.linalg.shards import block_affine, block_affine_rows
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class BAT(Settings):
    """W'_pq = W_pq (I + B_p) + B_p: the blocks of W, by rows of blocks, multiplied and shifted."""

    name: ClassVar[str] = "bat"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.miss:BATDialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "B starts at zero; nothing is drawn"}

    rank: int = Field(64, gt=0, description="Size of the blocks, which must divide the layer's inputs and outputs.")

    def build(self, site: Site, generator: torch.Generator) -> BATAdapter:
        common = math.gcd(site.in_features, site.out_features)
        if common % self.rank:
            raise OptionError(
                f"bat: blocks of {self.rank} do not divide the layer's {site.in_features} inputs and "
                f"{site.out_features} outputs; choose a divisor of {common} as the rank, or the method miss"
            )
        if site.packed:
            try:
                _ = site.weight
            except TargetError:
                raise OptionError(
                    "bat: the forward pass needs the layer's weight, which is packed in a way that is not known; use "
                    "the method miss, or the unquantised base model"
                ) from None
        return BATAdapter(torch.zeros(site.out_features // self.rank, self.rank, self.rank), site.in_features)

    def parameter_count(self, site: Site) -> int:
        return self.rank * site.out_features


class BATAdapter(WeightAdapter):
    """Holds the blocks B (out / r x r x r)."""

    method = "bat"
    parts: Parts = MappingProxyType({"block": "matrices"})

    def __init__(self, block: Tensor, n_in: int) -> None:
        super().__init__()
        self.block = nn.Parameter(block)
        self.n_in = n_in

    def parameter_groups(self) -> dict[str, Treatment]:
        # |ΔW| / |W| of a step goes with the root of r for what is multiplied, of n_in for what is added.
        r = self.block.shape[-1]
        return {"block": Treatment(rate=math.sqrt((r + 384) / (r + self.n_in)))}

    def weight(self, W: Tensor) -> Tensor:
        with without_autocast(W):
            return block_affine(W, self.block.to(W.dtype))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not site.rotates_input or site.rows(x) >= self.block.shape[-1]:
            return super().forward(x, site)
        x = autocast(x)
        with without_autocast(x):
            y = block_affine_rows(x.reshape(-1, x.shape[-1]), site.weight.to(x.dtype), self.block.to(x.dtype))
        y = y.view(*x.shape[:-1], -1)
        return y if site.bias is None else y + site.bias.to(y.dtype)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        return {"miss_block": self.block.detach()}
