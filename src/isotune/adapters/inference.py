"""The forward pass of an adapted layer where nothing learns: constants in the compute dtype, two launches more.

    y = x Wᵀ + b + (x L) R,   or  (x + (x L) R) Wᵀ + b,   and perhaps every output scaled

What an adapter makes of its parameters and of W is made once for many calls, and anew when one of them is replaced,
moved or changed in place, when other adapters run, for another dtype, and after a pass with gradients, for torch's
fused optimizers leave no trace on a parameter. Writing through `.data` in place goes unseen, as it does by autograd.
Rows of a batch that use different adapters, as when many users are served, go through all of them side by side,
`z = x [L_1 ... L_K]` masked by row, where few tokens a row make that cheaper than a gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from isotune.adapters.contract import Adapter, Constants
from isotune.adapters.mixed import Routing
from isotune.adapters.thin_layer import before, beside
from isotune.linalg.forms import price_of
from isotune.sites import Site

_TENSORS = (Tensor, nn.Parameter)  # not a subclass, which may change without a trace
_WITHOUT_END = 2**62
_SMALL = 64
"""Constants up to this rank are kept whatever the layer's size,"""
_SHARE = 1 / 16
"""and larger ones up to this share of the numbers of its weight."""


class Inference:
    """What one adapted layer keeps for one running adapter. A copy or a pickle of the layer starts without."""

    active: tuple[str, ...] = ()
    routing: Routing | None = None
    """The layer's, for which it was made."""

    def __init__(self, site: Site, adapters: Sequence[Adapter], made: Constants, dtype: torch.dtype) -> None:
        self.site, self.where = site, made.where
        self.L, self.R = made.L.to(dtype), made.R.to(dtype)
        self.excess = None if made.excess is None else made.excess.to(dtype)
        self.plain = site.plain(self.L.mT)
        modules = [site.layer, *(m for adapter in adapters for m in adapter.modules())]
        holders: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers)]
        self.made_of = [(d, n, t, *_stamp(t)) for d in holders for n, t in d.items() if isinstance(t, Tensor)]

    def serves(self, x: Tensor) -> bool:
        """Whether it was made of what is there now, for rows like x (..., in)."""
        if x.dtype != self.L.dtype or x.device != self.L.device:
            return False
        for holder, name, tensor, version, place in self.made_of:
            if holder.get(name) is not tensor or tensor._version != version:
                return False
            if place and tensor.data_ptr() != place:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor | None:
        """The layer's output (..., out) for x (..., in); None where another way is cheaper."""
        if self.plain is None:
            return self._through_site(x)
        W, b = self.plain
        shape = x.shape
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        z = self._project(rows)
        if self.where == "before":
            y = F.linear(torch.addmm(rows, z, self.R), W, b)
        elif self.excess is None:
            y = F.linear(rows, W, b).addmm_(z, self.R)
        else:
            y = F.linear(rows, W).addmm_(z, self.R)
            y = torch.addcmul(y, y, self.excess)
            y = y if b is None else y + b
        return y if len(shape) == 2 else y.view(*shape[:-1], len(W))

    def _project(self, rows: Tensor) -> Tensor:
        return rows @ self.L

    def _through_site(self, x: Tensor) -> Tensor:
        change = before if self.where == "before" else beside
        y, e = change(self.site, x, self.L, self.R), self.excess
        return y if e is None else self.site.over_outputs(y, lambda rows: torch.addcmul(rows, rows, e))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


class InferenceByRow(Inference):
    """The same for adapters of which every row of a batch has its own, or a weighted sum."""

    def __init__(
        self, site: Site, adapters: Sequence[Adapter], made: Sequence[Constants], dtype: torch.dtype, routing: Routing
    ) -> None:
        weights = routing.weights
        L, R = torch.cat([one.L for one in made], dim=1), torch.cat([one.R for one in made])
        super().__init__(site, adapters, Constants(made[0].where, L, R), dtype)
        ranks = torch.tensor([one.L.shape[1] for one in made], device=weights.device)
        self.mask = weights.to(dtype).repeat_interleave(ranks, dim=1)
        self.made_of.append(({"weights": weights}, "weights", weights, *_stamp(weights)))
        # All adapters do K times the work of one on every token; a gather moves the numbers of one for every row.
        few = max(1, price_of(L.to(dtype)) // (2 * max(1, len(made) - 1)))
        self.tokens = _WITHOUT_END if routing.index is None else few

    def __call__(self, x: Tensor) -> Tensor | None:
        """As for one adapter, for a batch x (b, ..., in) of as many rows as the routing has, with few tokens each."""
        fits = x.dim() > 1 and len(x) == len(self.mask) and x[0].numel() <= self.tokens * x.shape[-1]
        return super().__call__(x) if fits else None

    def _project(self, rows: Tensor) -> Tensor:
        z = rows @ self.L
        if len(rows) == len(self.mask):
            return z.mul_(self.mask)
        return z.view(len(self.mask), -1, z.shape[1]).mul_(self.mask[:, None]).view(z.shape)


def inference(x: Tensor, site: Site, adapters: Sequence[Adapter], routing: Routing | None) -> Inference | None:
    """What serves rows like x (..., in) with one adapter, or with those of a routing; None where nothing can.

    That is where the layer's forward is not its own, tensors are sharded, or a method has no such constants, or has
    a rank above 64 for which they would be more than a sixteenth of the weight.
    """
    tensors = [t for a in adapters for t in (*a.parameters(), *a.buffers())]
    if not site.packed:
        tensors += site.layer._parameters.values()
    strange = any(t is not None and (type(t) not in _TENSORS or t.is_inference()) for t in tensors)
    if strange or not site.readable or _sharded() or (routing is None and len(adapters) > 1):
        return None
    made = [found for adapter in adapters if (found := adapter.constants(x, site)) is not None]
    if not made or len(made) < len(adapters) or any(_large(one, site) for one in made):
        return None
    if routing is None:
        return Inference(site, adapters, made[0], x.dtype)
    if site.plain(x) is None or len({one.where for one in made}) > 1 or any(one.excess is not None for one in made):
        return None
    return InferenceByRow(site, adapters, made, x.dtype, routing)


def _large(made: Constants, site: Site) -> bool:
    return (
        made.L.shape[1] > _SMALL and made.L.numel() + made.R.numel() > _SHARE * site.in_features * site.out_features
    )


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """What changes with the values of a tensor, and with where they are."""
    return tensor._version, tensor.data_ptr() if type(tensor) in _TENSORS else 0


def _sharded() -> bool:
    """Whether parameters may be gathered anew for each pass, which leaves no trace on them."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _nothing() -> None:
    return None
