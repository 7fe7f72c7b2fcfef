"""Methods that change a weight from both sides: `W' = L W R`, or `W' = L diag(m) W R`.

Each part is an adapter of its own, and they are stacked: R runs in whichever form is cheapest, L on the outputs
without the bias, which is added last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isotune.adapted_site import AdaptedSite
from isotune.adapters.contract import Thin, WeightAdapter
from isotune.adapters.thin_rotation import ThinRotation
from isotune.linalg.precision import at_least_fp32
from isotune.sites import Site


class OutputScale(WeightAdapter):
    """`W' = diag(m) W`, with m (out), which starts at one; the bias stays."""

    method = "scale"

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = nn.Parameter(m)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        y = site(x)
        m = self.m.to(y.dtype)
        if site.bias is None:
            return site.over_rows(y, lambda rows: rows * m)
        # m (y - b) + b in one pass
        rest = ((1 - self.m) * site.bias).to(y.dtype)
        return site.over_rows(y, lambda rows: torch.addcmul(rest, rows, m))

    def weight(self, W: Tensor) -> Tensor:
        return self.m.to(W.dtype)[:, None] * W


class TwoSided(WeightAdapter):
    """`W' = L W R`, or with a scale `W' = L diag(m) W R`.

    `inner` is R, a thin rotation of side "in"; `outer` is Lᵀ, one of side "out".
    """

    def __init__(self, inner: ThinRotation, outer: ThinRotation, scale: OutputScale | None = None) -> None:
        super().__init__()
        self.inner, self.scale, self.outer = inner, scale, outer

    def strides(self, site: Site) -> dict[str, float]:
        sides = {"inner": self.inner, "outer": self.outer}
        return {f"{side}.{name}": far for side, part in sides.items() for name, far in part.strides(site).items()}

    @property
    def lengthless(self) -> frozenset[str]:
        sides = {"inner": self.inner, "outer": self.outer}
        return frozenset(f"{side}.{name}" for side, part in sides.items() for name in part.lengthless)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        site = AdaptedSite(site, self.inner)
        if self.scale is not None:
            site = AdaptedSite(site, self.scale)
        return self.outer(x, site)

    def weight(self, W: Tensor) -> Tensor:
        W = self.inner.weight(W)
        return self.outer.weight(W if self.scale is None else self.scale.weight(W))

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.scale is not None:
            return None
        # L W R - W = W (R - I) + (L - I) (W R)
        B, A = self.inner.factors(W)
        C, D = self.outer.factors(self.inner.weight(W))
        return torch.cat([B, C], dim=1), torch.cat([A, D])

    def thin_factors(self, site: Site) -> Thin | None:
        factors = self.factors(at_least_fp32(site.weight))
        return None if factors is None else Thin("beside", factors[1].mT, factors[0].mT)
