"""VeRA, vector-based random matrix adaptation: frozen random matrices, shared by all layers, scaled by vectors.

    W' = W + diag(b) B diag(d) A,   B (out x r) and A (r x in) frozen, b (out) and d (r) trained

One A and one B are drawn for the largest input and output of all adapted layers; each layer takes their first
columns and rows. b starts at zero.

Paper: "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv 2310.11454. Parameters: r + out.
Cost for n rows: 2 n r (in + out) flops.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, check_tensors
from isotune.adapters.random_projections import RandomProjections
from isotune.adapters.shared import Shared, largest
from isotune.linalg.random_bases import kaiming_uniform
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class VeRA(RandomProjections):
    """W' = W + diag(b) B diag(d) A: random matrices that all layers share, scaled by learned vectors."""

    name: ClassVar[str] = "vera"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 5e-2
    formula: ClassVar[str] = "rank + n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.random_projections:VeRADialect"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "the random matrices are shared and have a seed of their own, an option"
    }

    rank: int = Field(256, gt=0, le=2**16, description="Rank of W' - W.")
    start: float = Field(0.1, gt=0, description="What the entries of d start from.")

    def build(self, site: Site, generator: torch.Generator) -> VeRAAdapter:
        b, d = torch.zeros(site.out_features), torch.full((self.rank,), self.start)
        return VeRAAdapter(b, d, site.in_features, self.dropout)

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        n_in, n_out = largest(sites)
        generator = self.generator()
        A = kaiming_uniform((self.rank, n_in), generator)
        return {"vera_A": A, "vera_B": kaiming_uniform((n_out, self.rank), generator)}

    def parameter_count(self, site: Site) -> int:
        return self.rank + site.out_features


class VeRAAdapter(LowRank):
    """Holds lambda_b (out) and lambda_d (r), the paper's b and d."""

    method = "vera"

    def __init__(self, b: Tensor, d: Tensor, n_in: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.lambda_b, self.lambda_d = nn.Parameter(b), nn.Parameter(d)
        self.n_in = n_in

    def share(self, shared: Shared) -> None:
        self.shared = shared
        B, A = self.bases()
        n_out, r = len(self.lambda_b), len(self.lambda_d)
        check_tensors(
            {**shared.tensors(), "vera_A": A, "vera_B": B}, {"vera_A": (r, self.n_in), "vera_B": (n_out, r)}
        )

    def bases(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), this layer's part of what all share."""
        return self.shared["vera_B"][: len(self.lambda_b)], self.shared["vera_A"][:, : self.n_in]

    def change(self) -> tuple[Tensor, Tensor]:
        # Both vectors on B's side: A then is a constant, of which backward computes no gradient.
        B, A = self.bases()
        return torch.outer(self.lambda_b, self.lambda_d) * B, A
