"""A method made in a test file: one class pair, and it inherits every law."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune import Settings, WeightAdapter
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site
from laws.suite import laws_of


class Gain(Settings):
    """W' = diag(g) W: every output scaled."""

    name: ClassVar[str] = "gain"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_out"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "it starts from ones; nothing is drawn"}

    start: float = Field(1.0, ge=0.5, le=2, description="The gain to start from.")

    @property
    def identity_at_start(self) -> bool:
        return self.start == 1

    def build(self, site: Site, generator: torch.Generator) -> GainAdapter:
        return GainAdapter(torch.full((site.out_features,), self.start))

    def parameter_count(self, site: Site) -> int:
        return site.out_features


class GainAdapter(WeightAdapter):
    """Holds g (out)."""

    method = "gain"

    def __init__(self, g: Tensor) -> None:
        super().__init__()
        self.g = nn.Parameter(g)

    def weight(self, W: Tensor) -> Tensor:
        return self.g.to(W.dtype)[:, None] * W


test_law_holds_for_the_toy = laws_of(Gain)
