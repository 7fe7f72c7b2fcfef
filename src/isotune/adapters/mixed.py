"""One forward pass over rows that use different adapters, or several at once, each with a weight.

    y_i = x_i Wᵀ + b, with the thin changes Σ_k w_ik (x_i L_k) R_k before it, behind it, or beside it

The thin factors of the adapters are stacked, zero-padded to one rank. Where each row uses one adapter or none, linear
layers, and whatever changes the outputs of any layer, gather them by row and multiply in batches: the cost of one
adapter, plus b d r numbers gathered. Otherwise the rows run through all K adapters at once, which are then weighed: K
times the cost of one adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Adapter, Thin, WeightAdapter
from isotune.bare import bare_class
from isotune.errors import IsotuneError
from isotune.linalg.precision import autocast
from isotune.sites import CONVOLUTIONS, Site

NO_WEIGHT: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "fold_is_the_forward_and_unfold_restores",
            "state_is_that_of_the_base_and_the_adapters_beside_it",
            "factors_reproduce_the_change",
            "stack_is_the_product_of_its_parts",
        ),
        "what it adds depends on the row, so that there is no adapted weight",
    )
)
"""The laws that a mixture is exempt from."""


@dataclass(frozen=True)
class Routing:
    """Which of K adapters, or experts, the rows of a batch use."""

    weights: Tensor
    """(b, K): the weight of each in each row."""
    index: Tensor | None = None
    """(b): where every row uses one, or none, which (past the end: none)."""
    said: str = "the routing was given"
    """Who gave how many rows, in an error."""

    def of(self, x: Tensor, site: Site) -> Routing:
        """For the rows of x (n b, ...): each row here stands for n in a row there, as beams and tokens are.

        Raises IsotuneError where x is no such batch.
        """
        b = len(self.weights)
        times, rest = divmod(x.shape[0] if x.dim() else 0, b)
        if x.dim() < site.batch_dimensions or rest or not times:
            raise IsotuneError(
                f"{self.said} {b} rows, but a {bare_class(site.layer).__name__} got an input of shape "
                f"{tuple(x.shape)}, which is no batch of {b}, nor of a multiple of it; name one adapter, or None, or "
                "give the weights, for each row"
            )
        weights = self.weights.to(x.device).repeat_interleave(times, 0)
        return Routing(weights, None if self.index is None else self.index.to(x.device).repeat_interleave(times))


class ByRow(ABC):
    """An adapter without thin factors that rows of one batch can have of their own all the same."""

    @classmethod
    @abstractmethod
    def by_row(cls, adapters: Sequence[Self], y: Tensor, site: Site, weights: Tensor) -> Tensor:
        """The site's output y (b, ...), row i changed by as much of each adapter as weights (b, K) say."""


class Mixture(Adapter):
    """Several experts with thin factors on one site, weighed by a router for each row, or as `isotune.route` says.

    `y = f(x) + Σ_k w_k (x L_k) R_k`, w (..., K).
    """

    def __init__(self, experts: Sequence[WeightAdapter], router: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.routing: Routing | None = None
        self.tokens: Tensor | None = None  # (b, length) of the batch: which are no padding, as `isotune.tokens` said

    def weights(self, x: Tensor, site: Site) -> Tensor:
        """The weight of every expert in every row of x (..., in), shape (..., K); by default the router's softmax.

        Without a router they come from `isotune.route`. Raises IsotuneError where nothing was given there.
        """
        if self.router is not None:
            return self.router(x.to(next(self.router.parameters()).dtype)).softmax(-1)
        if self.routing is None:
            raise IsotuneError(
                f"{self.method} has no router of its own: say with isotune.route(model, weights) how much of each of "
                f"its {len(self.experts)} experts every row of the batch gets"
            )
        weights = self.routing.of(x, site).weights
        return weights.view(len(weights), *(1,) * (x.dim() - 2), -1)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        thin = [thin_of(expert, site) for expert in self.experts]  # type: ignore[arg-type]
        return _weighed(x, site, thin, self.weights(x, site))

    def reference(self, x: Tensor, site: Site) -> Tensor:
        y, weights = site(x), self.weights(x, site)
        changes = [expert.reference(x, site) - y for expert in self.experts]  # type: ignore[operator]
        return y + sum(weights[..., k, None].to(y.dtype) * change for k, change in enumerate(changes))


def thin_of(adapter: Adapter, site: Site) -> Thin:
    """The adapter's thin factors. Raises IsotuneError where the method has none."""
    thin = adapter.thin_factors(site)
    if thin is None:
        raise IsotuneError(
            f"rows of one batch cannot use different adapters of the method {adapter.method!r}, which has no thin "
            "factors; run one batch for each adapter"
        )
    return thin


def place_of(adapter: Adapter, site: Site) -> str:
    """Where an adapter changes the rows of a batch. Raises IsotuneError where they cannot differ in it."""
    return "by row" if isinstance(adapter, ByRow) else thin_of(adapter, site).where


def mixed_forward(x: Tensor, site: Site, adapters: Sequence[Adapter], routing: Routing) -> Tensor:
    """The site's output for a batch x (n b, ...) of which row i is changed as `routing` says.

    Raises IsotuneError where x is no batch of as many rows as the routing has, or of a multiple.
    """
    routing = routing.of(x, site)
    if isinstance(first := adapters[0], ByRow):
        return first.by_row(adapters, site(x), site, routing.weights)  # type: ignore[arg-type]
    thin = [thin_of(adapter, site) for adapter in adapters]
    if routing.index is None and site.rotates_input:
        return _weighed(x, site, thin, routing.weights.view(len(x), *(1,) * (x.dim() - 2), -1))
    where = thin[0].where
    if where == "before":
        v = autocast(x)
        return site(gathered(v, v, thin, routing))
    if where == "behind":
        return site.over_outputs(site(x), lambda y: gathered(y, y, thin, routing))
    y = site(x)
    if site.rotates_input:
        return gathered(x.to(y.dtype), y, thin, routing)
    return y + _selected(x, site, thin, routing.weights).to(y.dtype)


def _weighed(x: Tensor, site: Site, thin: Sequence[Thin], weights: Tensor) -> Tensor:
    """The output of a site of rows x (..., in), changed by all of `thin` with weights (..., K) that fit its rows."""
    if thin[0].where == "before":
        v = autocast(x)
        return site(v + weighed_sum(v, thin, weights))
    if thin[0].where == "behind":
        return site.over_outputs(site(x), lambda y: y + weighed_sum(y, thin, weights))
    y = site(x)
    return y + weighed_sum(x.to(y.dtype), thin, weights)


def weighed_sum(x: Tensor, thin: Sequence[Thin], weights: Tensor) -> Tensor:
    """`Σ_k w_k (x L_k) R_k` for rows x (..., d)."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        Z = x @ torch.cat([t.L for t in thin], dim=1).to(x.dtype)
        ranks = torch.tensor([t.L.shape[1] for t in thin], device=x.device)
        Z = Z * weights.to(x.dtype).repeat_interleave(ranks, -1, output_size=Z.shape[-1])
        return Z @ torch.cat([t.R for t in thin]).to(x.dtype)


def gathered(x: Tensor, y: Tensor, thin: Sequence[Thin], routing: Routing) -> Tensor:
    """`y_i + (x_i L_k) R_k` for x (b, ..., d) and y (b, ..., e), k the adapter of row i; in the dtype of both."""
    if routing.index is None:
        return y + weighed_sum(x, thin, routing.weights.view(len(x), *(1,) * (x.dim() - 2), -1))
    r = max(t.L.shape[1] for t in thin)
    L = torch.stack([_padded(t.L, r) for t in thin] + [thin[0].L.new_zeros(thin[0].L.shape[0], r)])
    R = torch.stack([_padded(t.R.mT, r).mT for t in thin] + [thin[0].R.new_zeros(r, thin[0].R.shape[1])])
    b = len(routing.index)
    with torch.autocast(device_type=x.device.type, enabled=False):
        Z = x.reshape(b, -1, x.shape[-1]) @ L.to(x.dtype)[routing.index]
        return torch.baddbmm(y.reshape(b, -1, y.shape[-1]), Z, R.to(x.dtype)[routing.index]).view(y.shape)


def _selected(x: Tensor, site: Site, thin: Sequence[Thin], weights: Tensor) -> Tensor:
    """`Σ_k w_ik (x_i L_k) R_k` as a convolution or an embedding reads x, for weights (b, K)."""
    K, r = len(thin), max(t.L.shape[1] for t in thin)
    A = torch.cat([_padded(t.L, r) for t in thin], dim=1).mT
    B = torch.cat([_padded(t.R.mT, r) for t in thin], dim=1)
    z = site.project(x, A)
    # A grouped convolution has K r features for each of its groups; an embedding has them last.
    features = 1 if site.kind in CONVOLUTIONS else z.dim() - 1
    groups = z.shape[features] // (K * r)
    mask = weights.repeat_interleave(r, dim=1).repeat(1, groups).to(z.dtype)
    shape = [1] * z.dim()
    shape[0], shape[features] = mask.shape
    return site.expand(z * mask.view(shape), B)


def _padded(t: Tensor, r: int) -> Tensor:
    """`t` (d, rank) with zero columns up to r."""
    return torch.nn.functional.pad(t, (0, r - t.shape[1]))
