"""SPPaRA, the structured pruning parallel residual adapter: a full change between channels, and channels left out.

    W' = diag(m_out) (W + P) diag(m_in),   P (out x in),   b' = m_out ∘ (b + β)

with channels left out during training as `sparse/structured.py` says; `isotune.slim` then makes the layers smaller.
On a convolution P, (out x in / groups), stands at the centre of the kernel: a 1 x 1 convolution beside one of 3 x 3,
with a ninth of its weights. P starts at zero; `init_range=1e-4` is the paper's start, a little off the base.

Paper: "Structured Pruning Adapters", 2022, arXiv 2211.10155, whose SPPaRA is a parallel residual adapter. Parameters:
in out / (taps of the kernel) + out with a bias, of which |m_in| |m_out| + |m_out| are stored. Cost: an addition of
the size of W in each pass.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Treatment
from isotune.adapters.sparse.channels import channels
from isotune.adapters.sparse.structured import ChannelMasked, ChannelPruning
from isotune.linalg.random_bases import uniform
from isotune.sites import Site


class SPPaRA(ChannelPruning):
    """W' = diag(m_out) (W + P) diag(m_in): a full change between channels, and channels that are left out."""

    name: ClassVar[str] = "sppara"
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_in * n_out + n_out"
    size_option: ClassVar[str | None] = None
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "P starts at zero; nothing is drawn"}

    init_range: float = Field(0.0, ge=0, le=0.01, description="P starts within these bounds; zero: as the base.")

    @property
    def identity_at_start(self) -> bool:
        return self.init_range == 0

    def build(self, site: Site, generator: torch.Generator) -> SPPaRAAdapter:
        self.check(site)
        return SPPaRAAdapter(uniform((site.out_features, channels(site)), self.init_range, generator), site, self)

    def parameter_count(self, site: Site) -> int:
        return site.out_features * (channels(site) + (site.bias is not None))


class SPPaRAAdapter(ChannelMasked):
    """Holds P (out x channels)."""

    method = "sppara"
    parts = MappingProxyType({"P": "matrix"})
    cuts = MappingProxyType({"P": ("out", "in"), "beta": ("out",)})

    def __init__(self, P: Tensor, site: Site, settings: SPPaRA) -> None:
        super().__init__(site, settings)
        self.P = nn.Parameter(P)

    def parameter_groups(self) -> dict[str, Treatment]:
        # Every number of W moves: |ΔW| / |W| of a step goes with the root of its inputs.
        return {"P": Treatment(rate=math.sqrt(384 / self.P.shape[1]))}

    def change(self) -> Tensor:
        return self.P
