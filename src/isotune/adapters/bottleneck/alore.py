"""ALoRE, aggregated low-rank experts: a residual map of the input, a sum of Kronecker products, before a block.

    x' = x + x H,   H = Σ_i S_i ⊗ (L_i R_i),   S_i (n x n), L_i (d/n x r), R_i (r x d/n), i = 1 ... n

On a block, such as `targets=["self_attn", "mlp"]` in the words of the model, it stands before everything that reads
the block's input; on a linear layer it is W' = W (I + H)ᵀ, an exact LoRA of rank n² r. R starts at zero.

Paper: "ALoRE: Efficient Visual Adaptation via Aggregating Low Rank Experts", 2024, arXiv 2412.08341, of which no code
was found: this form has the paper's number of parameters (0.15 M for ViT-B at n = r = 4). Parameters: n³ + 2 d r.
Cost for n rows: 4 d r n + 2 n r flops a row and expert, and none once it is in the weights.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.bottleneck.input_map import InputMap
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.random_bases import uniform
from isotune.sites import LINEAR, Site


class ALoRE(Settings):
    """x' = x + x Σ_i S_i ⊗ (L_i R_i): low-rank experts that map what a layer or a block reads."""

    name: ClassVar[str] = "alore"
    kinds: ClassVar[frozenset[str]] = LINEAR | {"block"}
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "8 + 2 * n_in * rank"

    rank: int = Field(4, gt=0, description="Rank of each expert.")
    experts: int = Field(2, gt=0, description="How many experts there are, each in so many parts; the paper has 4.")

    def build(self, site: Site, generator: torch.Generator) -> ALoREAdapter:
        d, n, r = site.in_features, self.experts, self.rank
        if d % n:
            raise OptionError(f"experts={n} does not divide the {d} numbers that the layer reads evenly")
        S = uniform((n, n, n), math.sqrt(3 / n), generator)
        L = uniform((n, d // n, r), 1 / math.sqrt(d // n), generator)
        return ALoREAdapter(S, L, torch.zeros(n, r, d // n), site.kind == "block")

    def parameter_count(self, site: Site) -> int:
        return self.experts**3 + 2 * site.in_features * self.rank


class ALoREAdapter(InputMap):
    """Holds S (n x n x n), L (n x d/n x r) and R (n x r x d/n), the first dimension of each that of the experts."""

    method = "alore"

    def __init__(self, S: Tensor, L: Tensor, R: Tensor, block: bool) -> None:
        super().__init__(block)
        self.S, self.L, self.R = nn.Parameter(S), nn.Parameter(L), nn.Parameter(R)

    def change(self, x: Tensor) -> Tensor:
        n = len(self.S)
        rows = x.reshape(-1, n, x.shape[-1] // n)
        S, L, R = (t.to(x.dtype) for t in (self.S, self.L, self.R))
        with torch.autocast(device_type=x.device.type, enabled=False):
            low = torch.einsum("nap,ipr->niar", rows, L)
            mixed = torch.einsum("niar,iab->nbir", low, S)
            return torch.einsum("nbir,irq->nbq", mixed, R).reshape(x.shape)

    def thin(self) -> tuple[Tensor, Tensor]:
        n, part, r = self.L.shape
        S, L, R = (at_least_fp32(t) for t in (self.S, self.L, self.R))
        left = torch.einsum("iab,ipr->apbir", S, L).reshape(n * part, n * n * r)
        right = torch.einsum("bc,irq->bircq", torch.eye(n, dtype=R.dtype, device=R.device), R)
        return left, right.reshape(n * n * r, n * part)
