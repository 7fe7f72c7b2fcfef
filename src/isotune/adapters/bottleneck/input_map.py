"""What linear residual adapters have in common: a low-rank map of what a layer, or a block, reads.

    y = f(x + x L R),   of a linear layer  W' = W (I + L R)ᵀ

On a block it stands before all layers that read its input, as in the papers; on a layer it is in that layer's weight.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from isotune.adapters.contract import Adapter, Thin
from isotune.linalg.precision import autocast
from isotune.sites import Site


class InputMap(Adapter):
    """`y = f(x + change(x))`, with `change(x) = x L R` and, on a block, perhaps a shift."""

    def __init__(self, block: bool) -> None:
        super().__init__()
        self.block = block

    @abstractmethod
    def change(self, x: Tensor) -> Tensor:
        """`x L R` (..., d), and a shift, for rows x (..., d), in x's dtype."""

    @abstractmethod
    def thin(self) -> tuple[Tensor, Tensor]:
        """L (d, k) and R (k, d)."""

    @property
    def has_weight(self) -> bool:
        return not self.block

    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        v = autocast(x)
        return site(v + self.change(v), *args, **kwargs)

    def reference(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        if self.block:
            return self.forward(x, site, *args, **kwargs)
        return site.forward_with(x, self.weight(site.weight), site.bias)

    def weight(self, W: Tensor) -> Tensor:
        if self.block:
            return super().weight(W)
        B, A = self.factors(W)
        return W + B @ A

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        L, R = (t.to(W.dtype) for t in self.thin())
        return W @ R.mT, L.mT

    def thin_factors(self, site: Site) -> Thin | None:
        return None if self.block else Thin("before", *self.thin())
