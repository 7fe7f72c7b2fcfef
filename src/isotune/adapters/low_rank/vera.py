"""VeRA, vector-based random matrix adaptation: frozen random matrices, shared by all layers, scaled by vectors.

    W' = W + diag(b) B diag(d) A,   B (out x r) and A (r x in) frozen, b (out) and d (r) trained

One A and one B are drawn for the largest input and output of all adapted layers; each layer takes their first
columns and rows. b starts at zero.

Paper: "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv 2310.11454. Parameters: r + out.
Cost for n rows: 2 n r (in + out) flops.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, check_tensors
from isotune.adapters.settings import Settings, other_kind, same_settings
from isotune.adapters.shared import Shared, largest
from isotune.linalg.random_bases import kaiming_uniform
from isotune.sites import Site


class VeRA(Settings):
    """W' = W + diag(b) B diag(d) A: random matrices that all layers share, scaled by learned vectors."""

    name: ClassVar[str] = "vera"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "embedding"})
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank + n_out"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "the random matrices are shared and have a seed of their own, an option"
    }
    peft_type: ClassVar[str | None] = "VERA"

    rank: int = Field(256, gt=0, description="Rank of W' - W.")
    start: float = Field(0.1, gt=0, description="What the entries of d start from.")
    projection_seed: int = Field(0, ge=0, lt=2**32, description="Seed of the random matrices.")
    save_projection: bool = Field(
        True, description="Store the random matrices, or draw them again on loading, which needs the same torch."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A while training.")

    def build(self, site: Site, generator: torch.Generator) -> VeRAAdapter:
        b, d = torch.zeros(site.out_features), torch.full((self.rank,), self.start)
        return VeRAAdapter(b, d, site.in_features, self.dropout)

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        n_in, n_out = largest(sites)
        generator = torch.Generator().manual_seed(self.projection_seed)
        A = kaiming_uniform((self.rank, n_in), generator)
        return {"vera_A": A, "vera_B": kaiming_uniform((n_out, self.rank), generator)}

    @property
    def stores_shared(self) -> bool:
        return self.save_projection

    def parameter_count(self, n_in: int, n_out: int, kind: str = "linear") -> int:
        return self.rank + n_out

    @classmethod
    def peft_config(cls, settings: dict[str, Settings]) -> dict[str, Any]:
        own = same_settings(settings)
        return {
            "r": own.rank,
            "d_initial": own.start,
            "projection_prng_key": own.projection_seed,
            "save_projection": own.save_projection,
            "vera_dropout": own.dropout,
            "bias": "none",
            "init_weights": True,
        }

    @classmethod
    def refused_by_peft(cls, site: Site) -> str | None:
        return other_kind(site, "linear", "conv1d")

    @classmethod
    def from_peft_config(cls, config: dict[str, Any], path: str) -> VeRA:
        return cls(
            rank=config["r"],
            start=config["d_initial"],
            projection_seed=config["projection_prng_key"],
            save_projection=config["save_projection"],
            dropout=config["vera_dropout"],
        )


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
