"""One forward pass over rows that use different adapters of one method.

    y_i = x_i Wᵀ + b, with the thin change (x_i L_k) R_k of row i's adapter k before it, behind it, or beside it

The thin factors of the adapters are stacked, zero-padded to one rank, with zeros at the end for rows that use none.
Linear layers, and whatever changes the outputs of any layer, gather them by row and multiply in batches: the cost of
one adapter, plus b d r numbers gathered. Convolutions and embeddings, whose first product is no product of rows, run
through all K adapters at once, and each row keeps its own part: K times the cost of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter, Thin, autocast
from isotune.errors import IsotuneError
from isotune.sites import Site

_LEAST_DIMENSIONS = {"conv2d": 4, "embedding": 1}  # of a batch, by kind of site; the others: 2


def thin_of(adapter: Adapter, site: Site) -> Thin:
    """The adapter's thin factors. Raises IsotuneError where the method has none."""
    thin = adapter.thin_factors(site)
    if thin is None:
        raise IsotuneError(
            f"rows of one batch cannot use different adapters of the method {adapter.method!r}, which has no thin "
            "factors; run one batch for each adapter"
        )
    return thin


def mixed_forward(x: Tensor, site: Site, adapters: Sequence[Adapter], index: Tensor) -> Tensor:
    """The site's output for a batch x (b, ...), row i changed by `adapters[index[i]]`; past the end, by none.

    Raises IsotuneError where x is no batch of as many rows as `index` (b) has.
    """
    if x.dim() < _LEAST_DIMENSIONS.get(site.kind, 2) or x.shape[0] != len(index):
        raise IsotuneError(
            f"isotune.use was given {len(index)} rows, but a {type(site.layer).__name__} got an input of shape "
            f"{tuple(x.shape)}, which is no batch of {len(index)}; name one adapter, or None, for each row"
        )
    thin = [thin_of(adapter, site) for adapter in adapters]
    index = index.to(x.device)
    where = thin[0].where
    if where == "before":
        v = autocast(x)
        return site(_add(v, v, thin, index))
    if where == "behind":
        return site.over_outputs(site(x), lambda y: _add(y, y, thin, index))
    y = site(x)
    if site.rotates_input:
        return _add(x.to(y.dtype), y, thin, index)
    return y + _selected(x, site, thin, index).to(y.dtype)


def _add(x: Tensor, y: Tensor, thin: Sequence[Thin], index: Tensor) -> Tensor:
    """`y_i + (x_i L_k) R_k` for x (b, ..., d) and y (b, ..., e), k the adapter of row i; in the dtype of both."""
    r = max(t.L.shape[1] for t in thin)
    L = torch.stack([_padded(t.L, r) for t in thin] + [thin[0].L.new_zeros(thin[0].L.shape[0], r)])
    R = torch.stack([_padded(t.R.mT, r).mT for t in thin] + [thin[0].R.new_zeros(r, thin[0].R.shape[1])])
    b = len(index)
    with torch.autocast(device_type=x.device.type, enabled=False):
        Z = x.reshape(b, -1, x.shape[-1]) @ L.to(x.dtype)[index]
        return torch.baddbmm(y.reshape(b, -1, y.shape[-1]), Z, R.to(x.dtype)[index]).view(y.shape)


def _selected(x: Tensor, site: Site, thin: Sequence[Thin], index: Tensor) -> Tensor:
    """`(x_i L_k) R_k` as a convolution or an embedding reads x: through all adapters, with others' parts zeroed."""
    K, r = len(thin), max(t.L.shape[1] for t in thin)
    A = torch.cat([_padded(t.L, r) for t in thin], dim=1).mT
    B = torch.cat([_padded(t.R.mT, r) for t in thin], dim=1)
    z = site.project(x, A)
    # A grouped convolution has K r features for each of its groups; an embedding has them last.
    features = 1 if site.kind == "conv2d" else z.dim() - 1
    groups = z.shape[features] // (K * r)
    own = torch.arange(K, device=index.device) == index[:, None]
    mask = own.repeat_interleave(r, dim=1).repeat(1, groups).to(z.dtype)
    shape = [1] * z.dim()
    shape[0], shape[features] = mask.shape
    return site.expand(z * mask.view(shape), B)


def _padded(t: Tensor, r: int) -> Tensor:
    """`t` (d, rank) with zero columns up to r."""
    return torch.nn.functional.pad(t, (0, r - t.shape[1]))
