"""LoRA, low-rank adaptation, with rank-stabilised scaling (rsLoRA) as an option.

    W' = W + s B A,   B (out x r), A (r x in),   s = alpha / r, or alpha / √r

Papers: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685; "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv 2312.03732. Parameters: r (in + out).
Cost for n rows: 2 n r (in + out) flops.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Adapter, LowRank, check_tensors
from isotune.adapters.settings import Settings, check_rank
from isotune.linalg.random_bases import uniform
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class LoRA(Settings):
    """W' = W + s B A: the weight plus a learned product of rank r."""

    name: ClassVar[str] = "lora"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out)"
    dialect: ClassVar[str] = "isotune.adapters.peft.lora:LoRADialect"

    rank: int = Field(8, gt=0, description="Rank of W' - W.")
    alpha: float | None = Field(None, gt=0, description="Scaling numerator; the default is the rank, so that s = 1.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) in place of alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A while training.")

    @property
    def resolved_alpha(self) -> float:
        """The scaling numerator, with the default filled in."""
        return self.alpha or float(self.rank)

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.resolved_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, site: Site, generator: torch.Generator) -> Adapter:
        return self.adapter(*fresh_factors(site, self.rank, generator), site)

    def check(self, site: Site) -> None:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")

    def shell(self, site: Site) -> Adapter:
        # A file may hold a layer padded with zeros to the rank of larger ones: no start to make, but one to read.
        check_rank(self.rank, site.in_features + site.out_features, "the sum of its sides")
        return self.adapter(torch.zeros(self.rank, site.in_features), torch.zeros(site.out_features, self.rank), site)

    def adapter(self, A: Tensor, B: Tensor, site: Site) -> Adapter:
        """The adapter of these options with A (r, in) and B (out, r)."""
        return LoRAAdapter(A, B, self.scale, self.dropout)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


class LoRAAdapter(LowRank):
    """Holds A (r x in) and B (out x r)."""

    method = "lora"

    def __init__(self, A: Tensor, B: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale = self.product_scale = scale

    def change(self) -> tuple[Tensor, Tensor]:
        return (self.B if self.scale == 1 else self.scale * self.B), self.A

    def scaled_change(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, self.scale

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        return lora_tensors(self.B.detach(), self.A.detach(), site)

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        own = lora_tensors(self.B.detach(), self.A.detach(), site)
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        for name, tensor in own.items():
            tensor.copy_(tensors[name])  # views of A and B


def fresh_factors(site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) to start from, with B A = 0. Raises OptionError where the rank is too large."""
    check_rank(rank, min(site.in_features, site.out_features), "its smaller side")
    A = uniform((rank, site.in_features), 1 / math.sqrt(site.in_features), generator)
    if site.kind == "embedding":
        # One column of A belongs to each token, so it starts at zero and B carries the randomness (as in PEFT).
        return torch.zeros_like(A), torch.randn(site.out_features, rank, generator=generator)
    return A, torch.zeros(site.out_features, rank)


def lora_tensors(B: Tensor, A: Tensor, site: Site) -> dict[str, Tensor]:
    """B (out, r) and A (r, in) under PEFT's names and in PEFT's shapes for the kind of site; views, not copies."""
    if site.kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if site.kind in CONVOLUTIONS:
        return {"lora_A.weight": site.layout(A), "lora_B.weight": site.pointwise(B)}
    return {"lora_A.weight": A, "lora_B.weight": B}
