"""A thin change `(x L) R` of the rows before a site, or of its outputs, by the cheapest way that the site has."""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.linalg.forms import inside_pays
from isotune.linalg.precision import autocast
from isotune.linalg.thin import thin_add, thin_linear
from isotune.sites import Site

_FEW = 2**18


def before(site: Site, x: Tensor, L: Tensor, R: Tensor, scale: float = 1.0) -> Tensor:
    """`site(x + scale (x L) R)` for x (..., in), L (in, r), R (r, in), on a site that takes rows."""
    x = autocast(x)
    L, R = L.to(x.dtype), R.to(x.dtype)
    plain = site.plain(x)
    if plain is None:
        return site(thin_add(x, L, R, scale=scale))
    return thin_linear("before", x, *plain, L, R, scale)


def beside(site: Site, x: Tensor, L: Tensor, R: Tensor, scale: float = 1.0, y: Tensor | None = None) -> Tensor:
    """`site(x) + scale (x L) R`, L (in, r), R (r, out), as the site reads x; y stands for `site(x)`."""
    # On few numbers autograd's own nodes cost less than the memory that one of ours saves.
    if y is None and x.numel() > _FEW and (plain := site.plain(x := autocast(x))) is not None:
        many = torch.is_grad_enabled() and inside_pays(x, site.out_features, L.shape[1])
        return thin_linear("inside" if many else "beside", x, *plain, L.to(x.dtype), R.to(x.dtype), scale)
    if y is None:
        y = site(x)
    if site.rotates_input:
        return thin_add(x.to(y.dtype), L.to(y.dtype), R.to(y.dtype), y, scale)
    return torch.add(y, site.expand(site.project(x, L.mT), R.mT).to(y.dtype), alpha=scale)
