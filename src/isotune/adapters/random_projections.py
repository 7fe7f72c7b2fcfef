"""Settings of methods whose frozen random matrices all layers share: their seed, and whether they are stored."""

from __future__ import annotations

import torch
from pydantic import Field

from isotune.adapters.settings import Settings


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
