"""Settings of methods whose frozen random matrices all layers share: their seed, and whether they are stored."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from isotune.adapters.settings import Settings, other_kind
from isotune.sites import LINEAR, Site


class RandomProjections(Settings):
    """Options of VeRA and RandLoRA, and what PEFT calls them."""

    rank: int = Field(gt=0, le=2**16, description="Rank of a random matrix.")
    projection_seed: int = Field(0, ge=0, lt=2**32, description="Seed of the random matrices.")
    save_projection: bool = Field(
        True, description="Store the random matrices, or draw them again on loading, which needs the same torch."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the change while training.")

    def generator(self) -> torch.Generator:
        """The source of the random matrices, at its start."""
        return torch.Generator().manual_seed(self.projection_seed)

    @property
    def stores_shared(self) -> bool:
        return self.save_projection

    @classmethod
    def refused_by_peft(cls, site: Site) -> str | None:
        return other_kind(site, *LINEAR)

    def common_peft_fields(self) -> dict[str, Any]:
        """The options above in PEFT's config."""
        return {
            "r": self.rank,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            f"{self.name}_dropout": self.dropout,
            "bias": "none",
            "init_weights": True,
        }

    @classmethod
    def common_options(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The options above from PEFT's config."""
        return {
            "rank": config["r"],
            "projection_seed": config["projection_prng_key"],
            "save_projection": config["save_projection"],
            "dropout": config[f"{cls.name}_dropout"],
        }
