"""Rotations that differ from the identity by a thin product, `R = I - U M`: each layer runs in its cheapest form."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType

import torch
from torch import Tensor

from isotune.adapters.contract import Constants, Parts, Rotation, Thin
from isotune.adapters.once import Once
from isotune.adapters.thin_layer import before, beside
from isotune.linalg.forms import Form, cheapest, exact_inside, price_of
from isotune.linalg.householder import rotate
from isotune.linalg.precision import at_least_fp32, autocast, compute_dtype
from isotune.linalg.thin import thin_linear
from isotune.sites import Site


class ThinRotation(Rotation):
    """`W' = W (I - U M)` (side "in") or `W' = (I - U M)ᵀ W` (side "out"), with U (d x r) and M (r x d)."""

    parts: Parts = MappingProxyType({"U": "columns"})

    def __init__(self) -> None:
        super().__init__()
        self._once = Once()

    @abstractmethod
    def thin(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """U (d, r) and M (r, d), made in fp32 or better, and rounded to `dtype` where one is given."""

    def _thin(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        U, M = self._once.get(self, lambda: self.thin(dtype), dtype)
        return U, M

    def rotate(self, v: Tensor, transpose: bool = False) -> Tensor:
        return rotate(v, *self._thin(v.dtype), transpose)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        U, M = self.thin(W.dtype)
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

    def constants(self, x: Tensor, site: Site) -> Constants | None:
        if self.side == "out" or self._form(x, site, self.thin()[1].shape[0], training=False) in ("input", "weight"):
            return super().constants(x, site)
        U, M = self.thin()
        return Constants("beside", -M.mT, self._columns_through(site, U, x.dtype))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if self.side == "out":
            return super().forward(x, site)
        dtype = compute_dtype(x)
        U, M = self._thin(dtype if site.rotates_input else None)
        form = self._form(x, site, M.shape[0], training=torch.is_grad_enabled() or self.training)
        if form == "input":
            # y = x (W R)ᵀ = (x Rᵀ) Wᵀ: note the transpose.
            return before(site, x, M.mT, U.mT, scale=-1.0)
        if form == "weight":
            W = site.weight
            return site.forward_with(x, rotate(W, U, M), site.bias)
        x = autocast(x)
        plain = site.plain(x)
        if form == "through" and plain is not None:
            return thin_linear("through", x, *plain, M.mT, U.mT, -1.0)
        WU = self._columns_through(site, U, dtype)
        if form == "inside" and plain is not None:
            return thin_linear("inside", x, *plain, M.mT, WU, -1.0)
        return beside(site, x, M.mT, WU, scale=-1.0)

    def _form(self, x: Tensor, site: Site, r: int, training: bool) -> Form:
        if site.packed:
            # Its forward may round or quantise what passes through: the rows of x only, not U's columns too.
            return "input"
        forms: tuple[Form, ...] = ("input", "through") if site.rotates_input else ("output", "weight")
        if training and site.rotates_input and exact_inside(compute_dtype(x)):
            forms = (*forms, "inside")
        sizes = site.rows(x), site.in_features, site.out_features
        return cheapest(forms, *sizes, r, training, x.requires_grad, price_of(x))

    def _columns_through(self, site: Site, U: Tensor, dtype: torch.dtype) -> Tensor:
        """(W U)ᵀ, shape (r, out): U's columns run through the layer as rows, which needs no dense W."""
        if site.rotates_input:
            return site.linear(U.mT.to(dtype))
        W = site.weight
        return (W @ U.to(W.dtype)).mT
