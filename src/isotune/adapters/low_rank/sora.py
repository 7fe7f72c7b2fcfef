"""SoRA, sparse low-rank adaptation: a LoRA with a gate on each rank, and a proximal step that closes gates for good.

    W' = W + s B diag(g) A,   s = alpha / r;   after each optimizer step  g <- sign(g) max(|g| - t, 0)

A gate whose optimizer steps do not keep up with the threshold t comes to zero exactly, and its rank is then left out
of what is exported: a LoRA with as many ranks as there are gates open. A closed gate still has a gradient, which may
open it again. With `levels` above 1 the threshold rises in as many equal parts of the training, from
`first_threshold` to `threshold`.

Paper: "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696. Parameters:
r (in + out + 1). Cost for n rows: 2 n r (in + out) flops. The authors' code takes the proximal step in three parts in
place, which closes gates up to 2 t and leaves |g| = t; the paper's t is a rate times a constant, here it is t.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from isotune.adapters.contract import Treatment
from isotune.adapters.low_rank.gated import Gated
from isotune.adapters.low_rank.lora import fresh_factors
from isotune.adapters.settings import Settings
from isotune.sites import CONVOLUTIONS, LINEAR, Site

_LEAST = 1e-8
"""Where a geometric schedule from zero begins."""


class SoRA(Settings):
    """W' = W + s B diag(g) A: a LoRA whose gates g close one by one."""

    name: ClassVar[str] = "sora"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "rank * (n_in + n_out + 1)"

    rank: int = Field(8, gt=0, description="Ranks to start from.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scale s; the default is twice the rank.")
    threshold: float = Field(3e-4, ge=0, le=0.01, description="What a gate loses after each step; the paper's t.")
    levels: int = Field(1, gt=0, description="In how many steps the threshold comes to that, each its share of time.")
    first_threshold: float = Field(0.0, ge=0, le=0.01, description="The threshold of the first of several levels.")
    schedule: Literal["linear", "log_linear", "exp_linear"] = Field(
        "linear", description="How levels are spaced: evenly, evenly in exp(t), or evenly in log(t)."
    )
    l1: float = Field(0.0, ge=0, description="Weight of a penalty on the mean of |g|, at each layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A while training.")

    def build(self, site: Site, generator: torch.Generator) -> SoRAAdapter:
        A, B = fresh_factors(site, self.rank, generator)
        return SoRAAdapter(A, B, torch.randn(self.rank, generator=generator), self)

    def threshold_at(self, progress: float) -> float:
        """t when this share of the training is done."""
        if self.levels == 1:
            return self.threshold
        share = min(int(progress * self.levels), self.levels - 1) / (self.levels - 1)
        first, last = self.first_threshold, self.threshold
        if self.schedule == "linear":
            return (1 - share) * first + share * last
        if self.schedule == "log_linear":
            return math.log((1 - share) * math.exp(first) + share * math.exp(last))
        return max(first, _LEAST) ** (1 - share) * max(last, _LEAST) ** share

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features + 1)


class SoRAAdapter(Gated):
    """Holds A (r x in), B (out x r) and the gates g (r)."""

    method = "sora"

    def __init__(self, A: Tensor, B: Tensor, g: Tensor, settings: SoRA) -> None:
        super().__init__(A, B, g, (settings.alpha or 2 * len(g)) / len(g), settings.dropout)
        self.settings = settings

    def penalty(self, site: Site) -> Tensor:
        return self.settings.l1 * self.g.abs().mean()

    def parameter_groups(self) -> dict[str, Treatment]:
        return {"g": Treatment(decay=0.0)}  # the proximal step is its decay

    def after_step(self, progress: float) -> None:
        t = self.settings.threshold_at(progress)
        self.g.data.copy_(torch.nn.functional.softshrink(self.g.data, t))
