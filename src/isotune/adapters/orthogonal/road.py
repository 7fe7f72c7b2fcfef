"""RoAd, 2D rotary adaptation: pairs of outputs are rotated and scaled.

    y' = c ⊙ y + s ⊙ ŷ,   c = α cos θ,  s = α sin θ,   ŷ the outputs with the two of each pair swapped, (-y_j, y_i)

for y = W x + b, the bias included. The outputs form groups of g, and i is paired with i + g/2 within its group.
Variant 1 has one θ and α for a pair (a rotation times a scale), variant 2 one for each output, and variant 4 one for
c and another for s of each output. θ starts at 0 and α at 1.

Paper: "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", NeurIPS 2024,
arXiv 2409.00119. Parameters: out, 2 out or 4 out. Cost for n rows: 3 n out flops. It has no low-rank form.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site

Variant = Literal[1, 2, 4]


class RoAd(Settings):
    """W' = R W, b' = R b: pairs of outputs are rotated by learned angles and scaled."""

    name: ClassVar[str] = "road"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.road:RoAdDialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "θ = 0 and α = 1 at every start"}

    variant: Variant = Field(
        1, description="Angles and scales: 1 for each pair, 2 for each output, 4 for each entry."
    )
    group_size: int = Field(
        2,
        ge=2,
        multiple_of=2,
        description="Outputs i and i + group_size / 2 of a group are a pair; must divide the outputs; 64 in PEFT.",
    )

    def build(self, site: Site, generator: torch.Generator) -> RoAdAdapter:
        groups = getattr(site.layer, "groups", 1)
        outputs = site.out_features // groups
        if outputs % self.group_size:
            of = f"each of its {groups} groups" if groups > 1 else "the layer"
            raise OptionError(
                f"road: group_size={self.group_size} does not divide the {outputs} outputs of {of}; "
                + (
                    "use group_size=2, which fits any even number"
                    if outputs % 2 == 0
                    else "an odd number has no pairs"
                )
            )
        size = self.parameter_count(site) // 2
        return RoAdAdapter(torch.zeros(size), torch.ones(size), self.variant, self.group_size)

    def parameter_count(self, site: Site) -> int:
        return self.variant * site.out_features


class RoAdAdapter(WeightAdapter):
    """Holds θ and α: out / 2, out or 2 out numbers each, group by group."""

    method = "road"

    def __init__(self, theta: Tensor, alpha: Tensor, variant: Variant, group_size: int) -> None:
        super().__init__()
        self.theta, self.alpha = nn.Parameter(theta), nn.Parameter(alpha)
        self.variant, self.group_size = variant, group_size

    def strides(self, site: Site) -> dict[str, float]:
        far = math.sqrt(site.out_features / 384)
        return {"theta": far, "alpha": far}

    def _columns(self) -> tuple[Tensor, Tensor]:
        """c and s (out), with the sign that the first of each pair has in ŷ moved to s."""
        half = self.group_size // 2
        c, s = self.alpha * self.theta.cos(), self.alpha * self.theta.sin()
        if self.variant == 1:
            c, s = (t.unflatten(0, (-1, 1, half)).expand(-1, 2, -1).reshape(-1) for t in (c, s))
        if self.variant == 4:
            c, s = (t.unflatten(0, (-1, 2, 2 * half))[:, k].reshape(-1) for k, t in enumerate((c, s)))
        first, second = s.unflatten(0, (-1, 2, half)).unbind(1)
        return c, torch.stack([-first, second], dim=1).flatten()

    def rotate(self, y: Tensor) -> Tensor:
        """`R y` for outputs y (..., out), in y's dtype."""
        c, s = (t.to(y.dtype) for t in self._columns())
        swapped = y.unflatten(-1, (-1, 2, self.group_size // 2)).flip(-2).flatten(-3)
        return y * c + swapped * s

    def forward(self, x: Tensor, site: Site) -> Tensor:
        return site.over_rows(site(x), self.rotate)

    def weight(self, W: Tensor) -> Tensor:
        return self.rotate(W.mT).mT

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else self.rotate(b)
