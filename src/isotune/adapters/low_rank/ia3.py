"""(IA)³, infused adapter by inhibiting and amplifying inner activations: every output, or input, scaled.

    y = l ∘ (W x + b),   W' = diag(l) W,  b' = l ∘ b        l (out), for keys and values
    y = W (l ∘ x) + b,   W' = W diag(l)                     l (in), for the second layer of a feed-forward block

l starts at one. A convolution's inputs are scaled by channel.

Paper: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022,
arXiv 2205.05638. Parameters: out, or in. Cost for n rows: 2 n out, or 2 n in, flops.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Side, WeightAdapter
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class IA3(Settings):
    """W' = diag(l) W, or W diag(l): every output, or input, scaled by a learned number."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 3e-2
    formula: ClassVar[str] = "n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.ia3:IA3Dialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "l starts at one; nothing is drawn"}

    side: Side = Field(
        "out",
        description="Scale the layer's outputs, or its inputs, as the paper does in feed-forward blocks; an "
        "embedding's output always.",
    )

    def _side_at(self, kind: str) -> Side:
        return "out" if kind == "embedding" else self.side

    def build(self, site: Site, generator: torch.Generator) -> IA3Adapter:
        side = self._side_at(site.kind)
        windows = site.kind in CONVOLUTIONS and (site.layer.groups, *site.layer.kernel_size)
        if side == "in" and windows and max(windows) > 1:
            raise OptionError(
                f"ia3: the inputs of this convolution, with kernel {tuple(site.layer.kernel_size)} and groups="
                f"{site.layer.groups}, cannot be scaled; that works with a kernel of 1 and groups=1. Use side='out'"
            )
        return IA3Adapter(torch.ones(site.in_features if side == "in" else site.out_features), side)

    def parameter_count(self, site: Site) -> int:
        return site.in_features if self._side_at(site.kind) == "in" else site.out_features


class IA3Adapter(WeightAdapter):
    """Holds l (out, or in)."""

    method = "ia3"

    def __init__(self, l: Tensor, side: Side) -> None:  # noqa: E741
        super().__init__()
        self.l = nn.Parameter(l)
        self.side = side

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if self.side == "in":
            return site(self._scaled(x, site))
        return self._scaled(site(x), site)

    def _scaled(self, v: Tensor, site: Site) -> Tensor:
        """`l ∘ v`, in v's dtype, for the features of v."""
        # As v + (l - 1) v: half precision holds l, a number close to one, too coarsely.
        change = (self.l - 1).to(v.dtype)
        return torch.addcmul(v, v, site.along(change))

    def weight(self, W: Tensor) -> Tensor:
        return (W * (self.l if self.side == "in" else self.l[:, None])).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.side == "in" else (b * self.l).to(b.dtype)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        column = site.kind not in CONVOLUTIONS and self.side == "out"
        shape = (-1, 1) if column else (1, -1, *(1,) * (-1 - site.features))
        return {"ia3_l": self.l.detach().view(shape)}
