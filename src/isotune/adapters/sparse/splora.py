"""SPLoRA, the structured pruning low-rank adapter: a LoRA that shrinks with the channels of its layer.

    W' = diag(m_out) (W + B A) diag(m_in),   B (out x r), A (r x in),   b' = m_out ∘ (b + β)

with channels left out during training as `sparse/structured.py` says; `isotune.slim` then makes the layers smaller.
On a convolution B A, (out x in / groups), stands at the centre of the kernel. B starts at zero; `init_range=1e-4` is
the paper's start, a little off the base. The authors' code lets a rank that is a small share of the outputs round to
zero, where nothing is adapted: here it is one at least. It has no way to know a layer's readers; here they follow.

Paper: "Structured Pruning Adapters", 2022, arXiv 2211.10155. Parameters: r (in + out) + out with a bias, of which
r (|m_in| + |m_out|) + |m_out| are stored, and a bit for each channel. Cost for n rows: 2 n r (in + out) flops on a
linear layer, 2 r in out on a convolution, whose changed weight is made in each pass.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts
from isotune.adapters.settings import check_rank
from isotune.adapters.sparse.channels import channels
from isotune.adapters.sparse.structured import ChannelMasked, ChannelPruning
from isotune.adapters.thin_layer import beside
from isotune.linalg.low_rank import at_most_full_rank
from isotune.linalg.random_bases import uniform
from isotune.sites import Site


class SPLoRA(ChannelPruning):
    """W' = diag(m_out) (W + B A) diag(m_in): a LoRA, and channels that are left out."""

    name: ClassVar[str] = "splora"
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out) + n_out"

    rank: int = Field(8, gt=0, description="Rank of the change; the paper has 16.")
    rank_share: float | None = Field(None, gt=0, lt=1, description="In place of a rank: a share of the outputs.")
    init_range: float = Field(0.0, ge=0, le=0.01, description="B starts within these bounds; zero: as the base.")

    @property
    def identity_at_start(self) -> bool:
        return self.init_range == 0

    def rank_at(self, site: Site) -> int:
        """The rank on this site, at least one."""
        return self.rank if self.rank_share is None else max(1, round(self.rank_share * site.out_features))

    def check(self, site: Site) -> None:
        super().check(site)
        check_rank(self.rank_at(site), min(channels(site), site.out_features), "its smaller side")

    def build(self, site: Site, generator: torch.Generator) -> SPLoRAAdapter:
        self.check(site)
        rank, n_in = self.rank_at(site), channels(site)
        A = uniform((rank, n_in), n_in**-0.5, generator)
        B = uniform((site.out_features, rank), self.init_range, generator)
        return SPLoRAAdapter(A, B, site, self)

    def parameter_count(self, site: Site) -> int:
        beta = 0 if site.bias is None else site.out_features
        return self.rank_at(site) * (channels(site) + site.out_features) + beta


class SPLoRAAdapter(ChannelMasked):
    """Holds A (r x channels) and B (out x r)."""

    method = "splora"
    parts: Parts = MappingProxyType({"A": "A", "B": "B"})
    cuts = MappingProxyType({"A": (None, "in"), "B": ("out", None), "beta": ("out",)})

    def __init__(self, A: Tensor, B: Tensor, site: Site, settings: SPLoRA) -> None:
        super().__init__(site, settings)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def change(self) -> Tensor:
        return self.B @ self.A

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.leaves_out:  # what W itself loses has any rank
            return None
        return at_most_full_rank(self.B.to(W.dtype), self.at_centre(self.A).to(W.dtype))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not site.rotates_input:
            return self.reference(x, site)
        y = beside(site, x if self.kept_in is None else x * self.kept_in, self.A.mT, self.B.mT)
        y = y if self.beta is None else y + self.beta.to(y.dtype)
        return y if self.kept_out is None else y * self.kept_out
