"""What bottleneck adapters have in common: a narrow network beside a block, or behind it.

    parallel      y = f(x) + a U act(D x + d) + a u
    sequential    y = f(x) + a U act(D f(x) + d) + a u

with D (r x in), U (out x r), and U = 0 at the start. In a layer that adds what its block gives to what it keeps,
these are the two places that papers have. An adapter on a block that normalises its own input reads before the norm;
on one that gets normalised inputs, as an MLP of Llama or ViT does, after it.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Branch, Parts
from isotune.adapters.settings import Settings
from isotune.linalg.random_bases import uniform
from isotune.sites import Site

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}

Activation = Literal["relu", "gelu", "silu", "tanh"]
Norm = Literal["none", "in", "out"]


class PlacedSettings(Settings):
    """What narrow networks at a block have in common: one of two places, and a width."""

    kinds: ClassVar[frozenset[str]] = frozenset({"block"})
    usual_targets: ClassVar[str] = "mlp"

    rank: int = Field(8, gt=0, description="Width of the network.")
    place: Literal["parallel", "sequential"] = Field(
        "parallel", description="Whether it reads what the block reads (parallel), or what it gives (sequential)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout between the activation and U while training.")

    @property
    def reads(self) -> Literal["input", "output"]:
        """What a `Branch` in this place reads."""
        return "input" if self.place == "parallel" else "output"

    def sides(self, site: Site) -> tuple[int, int]:
        """How many numbers it reads at a site, and how many it gives."""
        return (site.in_features if self.place == "parallel" else site.out_features), site.out_features


class BottleneckSettings(PlacedSettings):
    """The options that bottlenecks have in common."""

    formula: ClassVar[str] = "rank * (n_in + n_out + 1) + n_out"

    rank: int = Field(64, gt=0, description="Width of the bottleneck.")
    activation: Activation = Field("relu", description="Between D and U.")
    scale: float = Field(1.0, gt=0, description="Factor on the change; the papers' a, or s.")
    learn_scale: bool = Field(False, description="Train the factor.")
    norm: Norm = Field("none", description="A LayerNorm on what the adapter reads (in), or on its change (out).")

    def build(self, site: Site, generator: torch.Generator) -> Bottleneck:
        return Bottleneck(*self.start(site, generator), self)

    def start(self, site: Site, generator: torch.Generator) -> tuple[Tensor, int]:
        """D (rank x in), drawn, and out."""
        n_in, n_out = self.sides(site)
        return uniform((self.rank, n_in), 1 / math.sqrt(n_in), generator), n_out

    def parameter_count(self, site: Site) -> int:
        n_in, n_out = self.sides(site)
        normalised = {"none": 0, "in": n_in, "out": n_out}[self.norm]
        return self.rank * (n_in + n_out + 1) + n_out + self.learn_scale + 2 * normalised


class Bottleneck(Branch):
    """Holds D (r x in), d (r), U (out x r) and u (out); the scale and the norm, where they train."""

    method = "bottleneck"
    parts: Parts = MappingProxyType({"D": "A", "U": "B"})

    def __init__(self, D: Tensor, n_out: int, settings: BottleneckSettings) -> None:
        super().__init__()
        self.method = settings.name  # type: ignore[misc]
        r, n_in = D.shape
        self.D, self.d = nn.Parameter(D), nn.Parameter(torch.zeros(r))
        self.U, self.u = nn.Parameter(torch.zeros(n_out, r)), nn.Parameter(torch.zeros(n_out))
        self.scale = nn.Parameter(torch.tensor(settings.scale)) if settings.learn_scale else settings.scale
        self.norm = None if settings.norm == "none" else nn.LayerNorm(n_in if settings.norm == "in" else n_out)
        self.settings, self.dropout = settings, nn.Dropout(settings.dropout)
        self.reads = settings.reads  # type: ignore[misc]

    def change(self, v: Tensor) -> Tensor:
        v = v.to(self.D.dtype)
        if self.norm is not None and self.settings.norm == "in":
            v = self.norm(v)
        z = self.dropout(ACTIVATIONS[self.settings.activation](nn.functional.linear(v, self.D, self.d)))
        y = self.scale * nn.functional.linear(z, self.U, self.u)
        return y if self.norm is None or self.settings.norm == "in" else self.norm(y)
