"""Rotations that differ from the identity by a thin product, `R = I - U M`: each layer runs in its cheapest form."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from isotune.adapted_site import AdaptedSite
from isotune.adapters.cache import Kept
from isotune.adapters.contract import Parts, Rotation, Thin, before, beside
from isotune.linalg.forms import Form, cheapest
from isotune.linalg.householder import rotate
from isotune.linalg.precision import at_least_fp32, autocast
from isotune.sites import Site


class _Constants(NamedTuple):
    """U and M, and where it is needed (W U)ᵀ, of a frozen adapter on a frozen layer."""

    U: Tensor
    M: Tensor
    WU: Tensor | None


class ThinRotation(Rotation):
    """`W' = W (I - U M)` (side "in") or `W' = (I - U M)ᵀ W` (side "out"), with U (d x r) and M (r x d)."""

    parts: Parts = MappingProxyType({"U": "columns"})

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept[_Constants] = Kept()

    @abstractmethod
    def thin(self) -> tuple[Tensor, Tensor]:
        """U (d, r) and M (r, d), in fp32 or better."""

    def rotate(self, v: Tensor, transpose: bool = False) -> Tensor:
        return rotate(v, *self.thin(), transpose)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        U, M = (t.to(W.dtype) for t in self.thin())
        return (-(W @ U), M) if self.side == "in" else (-M.mT, U.mT @ W)

    def thin_factors(self, site: Site) -> Thin | None:
        if type(self).forward is not ThinRotation.forward:
            return None
        U, M = self.thin()
        if self.side == "in" and site.rotates_input:
            return Thin("before", -M.mT, U.mT)
        if self.side == "out" and site.rotates_output:
            return Thin("behind", -U, M)
        B, A = self.factors(at_least_fp32(site.weight))
        return Thin("beside", A.mT, B.mT)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if self.side == "out":
            return super().forward(x, site)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or isinstance(site, AdaptedSite):
            return self._forward(x, site, *self.thin(), None, training=torch.is_grad_enabled())
        kept = self._constants(site, x)
        return self._forward(x, site, kept.U, kept.M, kept.WU, training=False)

    def _forward(self, x: Tensor, site: Site, U: Tensor, M: Tensor, WU: Tensor | None, training: bool) -> Tensor:
        form = self._form(x, site, M.shape[0], training)
        if form == "input":
            # y = x (W R)ᵀ = (x Rᵀ) Wᵀ: note the transpose.
            return before(site, x, M.mT, U.mT, scale=-1.0)
        if form == "weight":
            W = site.weight
            return site.forward_with(x, rotate(W, U, M), site.bias)
        if WU is None:
            WU = self._columns_through(site, U, autocast(x).dtype)
        return beside(site, x, M.mT, WU, scale=-1.0)

    def _form(self, x: Tensor, site: Site, r: int, training: bool) -> Form:
        if site.packed:
            # Its forward may round or quantise what passes through: the rows of x only, not U's columns too.
            return "input"
        forms: tuple[Form, ...] = ("input", "output") if site.rotates_input else ("output", "weight")
        sizes = site.rows(x), site.in_features, site.out_features
        return cheapest(forms, *sizes, r, training, x.requires_grad)

    def _columns_through(self, site: Site, U: Tensor, dtype: torch.dtype) -> Tensor:
        """(W U)ᵀ, shape (r, out): U's columns run through the layer as rows, which needs no dense W."""
        if site.rotates_input:
            return site.linear(U.mT.to(dtype))
        W = site.weight
        return (W @ U.to(W.dtype)).mT

    def _constants(self, site: Site, x: Tensor) -> _Constants:
        """What inference keeps between calls."""
        dtype = autocast(x).dtype

        def made() -> _Constants:
            U, M = self.thin()
            needed = self._form(x, site, M.shape[0], training=False) == "output"
            return _Constants(U, M, self._columns_through(site, U, dtype) if needed else None)

        frozen = () if site.packed else (site.parameter,)
        return self._kept.get((*self.parameters(), *self.buffers(), *frozen), made, dtype)

    def train(self, mode: bool = True) -> ThinRotation:
        """Set the mode; the constants that inference kept are dropped when training starts."""
        if mode:
            self._kept = Kept()
        return super().train(mode)
