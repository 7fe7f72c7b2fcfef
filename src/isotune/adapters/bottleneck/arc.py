"""ARC, adapter re-composing: one projection for the whole network, and a few numbers for each layer.

    x' = x + x D diag(c) Dᵀ + u,   D (d x r) shared by all layers of a width, c (r) and u (d) of each

On a block, such as `targets=["self_attn", "mlp"]`, it stands before everything that reads the block's input. On a
linear layer, whose weight it then is in, W' = W (I + D diag(c) Dᵀ), it has no u: an exact LoRA of rank r. c and u
start at zero, where the authors' code draws c at random for the MLP, so that the model is unchanged at first.

Paper: "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing", NeurIPS 2023, arXiv 2310.06234,
which has one D for attention and one for MLPs. Parameters: d r in all, and r + d for each block or r for each layer.
Cost for n rows: 4 n d r flops, and none once it is in the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.bottleneck.input_map import InputMap
from isotune.adapters.settings import Settings
from isotune.adapters.shared import Shared
from isotune.linalg.random_bases import uniform
from isotune.sites import LINEAR, Site


class ARC(Settings):
    """x' = x + x D diag(c) Dᵀ: one projection that all layers share, re-composed by each."""

    name: ClassVar[str] = "arc"
    kinds: ClassVar[frozenset[str]] = LINEAR | {"block"}
    learning_rate: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "rank"
    trains_shared: ClassVar[bool] = True
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "D, which all layers share, is drawn by an option"}

    rank: int = Field(50, gt=0, description="Columns of D.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of D.")

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        widths = sorted({site.in_features for site in sites})
        draw = torch.Generator().manual_seed(self.seed)
        return {f"arc_D_{d}": uniform((d, self.rank), (6 / (d + self.rank)) ** 0.5, draw) for d in widths}

    def build(self, site: Site, generator: torch.Generator) -> ARCAdapter:
        block = site.kind == "block"
        return ARCAdapter(torch.zeros(self.rank), torch.zeros(site.in_features) if block else None, site.in_features)

    def parameter_count(self, site: Site) -> int:
        return self.rank + (site.in_features if site.kind == "block" else 0)


class ARCAdapter(InputMap):
    """Holds c (r) and, on a block, u (d)."""

    method = "arc"

    def __init__(self, c: Tensor, u: Tensor | None, d: int) -> None:
        super().__init__(u is not None)
        self.c, self.u = nn.Parameter(c), None if u is None else nn.Parameter(u)
        self.d = d

    def share(self, shared: Shared) -> None:
        self.shared = shared
        if tuple(shared[f"arc_D_{self.d}"].shape) != (self.d, len(self.c)):
            raise ValueError(f"arc_D_{self.d} has not the shape {(self.d, len(self.c))}")

    def thin(self) -> tuple[Tensor, Tensor]:
        D = self.shared[f"arc_D_{self.d}"]
        return D * self.c, D.mT

    def change(self, x: Tensor) -> Tensor:
        L, R = (t.to(x.dtype) for t in self.thin())
        with torch.autocast(device_type=x.device.type, enabled=False):
            y = (x @ L) @ R
        return y if self.u is None else y + self.u.to(x.dtype)
