"""ETHER+, relaxed hyperplane reflections: a direction taken out and one put in, for each block on both sides.

    W' = H W H̃,   H = diag(H_1, ..., H_k),   H_i = I - û_i û_iᵀ + v̂_i v̂_iᵀ,   and H̃ likewise

with u_i, v_i (out / k) and ũ_i, ṽ_i (in / k) trained. H_i is the identity where u_i = ±v_i, which is the start; it
is at most at distance |H_i - I|_F = √2 from it, and not orthogonal in between.

Paper: "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", ICML 2024, arXiv 2405.20271.
Parameters: 2 (in + out), for any k. Cost for n rows: 8 n k (in + out) flops; W' - W has rank at most 4 k.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Side
from isotune.adapters.orthogonal.ether import block_vectors
from isotune.adapters.orthogonal.two_sided import TwoSided
from isotune.adapters.settings import Settings
from isotune.adapters.thin_rotation import ThinRotation
from isotune.linalg.householder import block_columns, mean_length, unit_columns
from isotune.linalg.precision import at_least_fp32, rounded
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class ETHERPlus(Settings):
    """W' = H W H̃: each block of both sides exchanges one direction for another; the identity at the start."""

    name: ClassVar[str] = "ether_plus"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "2 * (n_in + n_out)"

    blocks: int = Field(1, gt=0, description="Number of blocks on each side; W' - W has 4 times this rank.")

    def build(self, site: Site, generator: torch.Generator) -> ETHERPlusAdapter:
        inside = block_vectors(self.name, site.in_features, self.blocks, "in", generator)
        outside = block_vectors(self.name, site.out_features, self.blocks, "out", generator)
        return ETHERPlusAdapter(Exchange(inside, "in"), Exchange(outside, "out"))

    def parameter_count(self, site: Site) -> int:
        return 2 * (site.in_features + site.out_features)


class Exchange(ThinRotation):
    """`W' = W H` (side "in") or `W' = H W` (side "out"), H symmetric; it starts with v = u."""

    method = "exchange"

    def __init__(self, u: Tensor, side: Side) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(u.clone())
        self.side = side

    def strides(self, site: Site) -> dict[str, float]:
        turned = math.sqrt(self.u.numel() / 384)
        return {"u": turned / mean_length(self.u.mT), "v": turned / mean_length(self.v.mT)}

    @property
    def lengthless(self) -> frozenset[str]:
        return frozenset({"v", "u"})

    def thin(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        U, V = (unit_columns(block_columns(at_least_fp32(t))) for t in (self.u, self.v))
        return rounded((torch.cat([U, V], dim=1), torch.cat([U, -V], dim=1).mT), dtype)


class ETHERPlusAdapter(TwoSided):
    """Holds u and v (k x d / k) for each side."""

    method = "ether_plus"
