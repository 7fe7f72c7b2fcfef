"""Choose which adapters run and train, and ask a model about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isotune.adapted_site import AdaptedSite
from isotune.adapters.contract import Adapter
from isotune.adapters.mixed import Mixture, Routing, place_of
from isotune.errors import IsotuneError, nearest
from isotune.model.adapted import Adapted
from isotune.model.names import adapted_layers, changed_modules
from isotune.quantised import is_packed
from isotune.sites import Site, device_of, require_site


@dataclass(frozen=True)
class SiteRow:
    """One adapter on one layer, as `describe` reports it."""

    site: str
    """Path of the layer."""
    adapter: str
    """Name of the adapter."""
    method: str
    """Its method, or "full" for a module that is trained in full."""
    trainable: int
    """Parameters it trains."""
    share: float
    """`trainable` as a share of the base model's parameters."""
    active: bool
    """Whether it takes part in the forward pass."""


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on the model, in the order in which they were added."""
    return list(dict.fromkeys(name for _, module in changed_modules(model) for name in module.isotune))


def active_names(model: nn.Module) -> list[str]:
    """The names of the adapters in use."""
    return list(dict.fromkeys(name for _, module in changed_modules(model) for name in module.isotune.active))


def use(
    model: nn.Module,
    *names: str,
    rows: Sequence[str | None] | None = None,
    train: bool | Iterable[str] = True,
) -> nn.Module:
    """Let the named adapters, stacked in the order given, run; all others rest. No name at all: the bare base.

    Args:
        model: A model with adapters, changed in place.
        names: The adapters to stack.
        rows: In place of names: the adapter of each row of the batches that follow, None for the bare base, until the
            next call. The adapters must be of one method; `train` then means those named here. A batch may have a
            multiple of these rows, as when beams are searched: each then stands for as many in a row.
        train: Which of them learn: all, none, or those named.

    Returns:
        The same model.

    Raises:
        IsotuneError: An unknown name, adapters folded into the weights, or rows that cannot share a batch. The model
            is then as it was.
    """
    if rows is None:
        return _use(model, names, None, train)
    if names:
        raise IsotuneError("use takes the names of adapters to stack, or rows=[...], not both")
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    return _use(model, names, _one_hot([names.index(r) if r is not None else len(names) for r in rows], names), train)


def route(model: nn.Module, weights: Tensor, *names: str, train: bool | Iterable[str] = True) -> nn.Module:
    """Say how much of each adapter, or of each expert of a mixture, the rows of the batches that follow get.

    Args:
        model: A model with adapters, changed in place.
        weights: (b, K), a row for each row of the batch, or for as many in a row as the batch has more; gradients
            flow into it. The K are the named adapters or, without names, the experts of the mixtures in use that
            have no router of their own and, where there are none, the adapters in use, in their order.
        names: Adapters of one method, which become those in use.
        train: Which of these learn: all, none, or those named.

    Returns:
        The same model.

    Raises:
        IsotuneError: An unknown name, another number of columns, adapters that cannot share a batch, or none in use.
            The model is then as it was.
    """
    if weights.dim() != 2:
        raise IsotuneError(f"route takes weights of shape (rows, adapters or experts), not {tuple(weights.shape)}")
    adapters = [adapter for _, layer in adapted_layers(model) for adapter in layer.isotune.running()]
    routed = [a for a in adapters if isinstance(a, Mixture) and a.router is None]
    if names or not routed:
        active = names or tuple(active_names(model))
        _check_columns(weights, len(active), f"the adapters {', '.join(active)}" if active else "no adapter in use")
        return _use(model, active, Routing(weights), train if names else _learning(model))
    for mixture in routed:
        _check_columns(weights, len(mixture.experts), f"the experts of {mixture.method}")
    for mixture in routed:
        mixture.routing = Routing(weights)
    return model


def tokens(model: nn.Module, mask: Tensor | None) -> nn.Module:
    """Tell the adapters that count or mix tokens which of the batches that come are no padding; None: all.

    `mask` (batch, length) is what models call `attention_mask`. `isotune train` tells them of every batch.
    """
    for _, layer in adapted_layers(model):
        for adapter in layer.isotune.running():
            if hasattr(adapter, "tokens"):
                adapter.tokens = mask
    return model


def _check_columns(weights: Tensor, number: int, what: str) -> None:
    if not number or weights.shape[1] != number:
        raise IsotuneError(f"route was given weights with {weights.shape[1]} columns for {what} ({number})")


def _learning(model: nn.Module) -> list[str]:
    """The adapters that learn."""
    homes = [module.isotune for _, module in changed_modules(model)]
    return [name for home in homes for name, part in home.items() if any(p.requires_grad for p in part.parameters())]


def _one_hot(places: Sequence[int], names: Sequence[str]) -> Routing:
    index = torch.tensor(places, dtype=torch.long, device="cpu")
    return Routing(torch.nn.functional.one_hot(index, len(names) + 1)[:, :-1].float(), index)


def _use(model: nn.Module, names: tuple[str, ...], routing: Routing | None, train: bool | Iterable[str]) -> nn.Module:
    """Let these adapters run: stacked or, with a routing whose columns they are, by row."""
    known = adapter_names(model)
    learning = (names if train else ()) if isinstance(train, bool) else tuple(train)
    for name in (*names, *learning):
        if name not in known:
            there = ", ".join(known) or "none"
            raise IsotuneError(f"no adapter {name!r} on this model.{nearest(name, known)} It has: {there}.")
    if any(module.isotune.folded for _, module in changed_modules(model)):
        raise IsotuneError("the active adapters are folded into the weights; call unfold before switching")
    if routing is not None:
        _check_rows(model, names)
    for _, module in changed_modules(model):
        home = module.isotune
        home.active = tuple(name for name in names if name in home)
        home.routing = None
        if routing is not None and home.active:
            home.routing = _columns(routing, [names.index(name) for name in home.active], device_of(module))
        for name, part in home.items():
            part.requires_grad_(name in names and name in learning)
    return model


def _columns(routing: Routing, columns: list[int], device: torch.device) -> Routing:
    """The routing of some of the adapters, on a device."""
    weights, index = routing.weights[:, columns].to(device), routing.index
    if index is not None:
        places = {column: place for place, column in enumerate(columns)}
        index = torch.tensor([places.get(int(i), len(columns)) for i in index], device=device)
    return Routing(weights, index)


@torch.no_grad()
def _check_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Raise IsotuneError unless rows of one batch can use these adapters."""
    for path, module in changed_modules(model):
        parts = [name for name in names if name in module.isotune]
        if not parts:
            continue
        if not isinstance(module, Adapted):
            raise IsotuneError(f"{parts[0]!r} trains {path!r} in full, which the rows of a batch must share")
        site = require_site(module, path)
        if not site.called:
            raise IsotuneError(f"{parts[0]!r} changes {path!r}, a parameter, which the rows of a batch must share")
        adapters: dict[str, Any] = {name: module.isotune[name] for name in parts}
        layouts = {(a.method, place_of(a, site)): name for name, a in adapters.items()}
        if len(layouts) > 1:
            found = " and ".join(f"{name!r} ({method}, {where})" for (method, where), name in layouts.items())
            raise IsotuneError(f"rows of one batch need adapters of one method and side; at {path!r} are {found}")


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model is its bare base. Raises IsotuneError while adapters are folded."""
    if any(module.isotune.folded for _, module in changed_modules(model)):
        raise IsotuneError("the active adapters are folded into the weights; call unfold before disabling them")
    before = [(module.isotune, module.isotune.enabled) for _, module in changed_modules(model)]
    try:
        for home, _ in before:
            home.enabled = False
        yield model
    finally:
        for home, enabled in before:
            home.enabled = enabled


def describe(model: nn.Module) -> list[SiteRow]:
    """One row for each adapter on each layer, and for each module trained in full."""
    changed = list(changed_modules(model))
    extra = {id(p) for _, module in changed for p in module.isotune.parameters()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in extra)
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_packed(module):
            # Integers that hold several numbers each are counted as the numbers.
            weight = module._parameters.get("weight")
            base += module.in_features * module.out_features - (0 if weight is None else weight.numel())
    rows: list[SiteRow] = []
    seen: set[int] = set()
    for path, module in changed:
        home = module.isotune
        for name, part in home.items():
            own = {id(p): p.numel() for p in part.parameters() if id(p) not in seen}
            seen |= own.keys()  # what adapters share is counted once, at the first
            trainable = sum(own.values())
            method = home.settings[name].name if name in home.settings else "full"
            rows.append(SiteRow(path, name, method, trainable, trainable / max(base, 1), name in home.active))
    return rows


def penalty(model: nn.Module) -> Tensor:
    """The sum of the active adapters' penalties, a scalar to add to the loss."""
    terms = [
        _penalty(adapter, require_site(layer, path))
        for path, layer in adapted_layers(model)
        for adapter in layer.isotune.running()
    ]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


class _Penalty(nn.Module):
    """An adapter's penalty as a module's forward, so that it can be computed with other parameters."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, site: Site) -> Tensor:
        return self.adapter.penalty(site)


def _penalty(adapter: Adapter, site: Site) -> Tensor:
    """The adapter's penalty, over the whole of its parameters where FSDP has sharded them."""
    whole = {f"adapter.{n}": p.full_tensor() for n, p in adapter.named_parameters() if hasattr(p, "full_tensor")}
    return functional_call(_Penalty(adapter), whole, (site,)) if whole else adapter.penalty(site)


def after_step(model: nn.Module, progress: float = 1.0, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Let the active adapters do what their method does after each optimizer step.

    It belongs between `optimizer.step()` and `optimizer.zero_grad()`: some methods look at gradients. `progress` is
    the share of training that is done, for methods with a schedule: without it they are at its end. The optimizer
    forgets what it knows of parameters that a method starts anew.
    """
    found: dict[tuple[str, type[Adapter]], dict[Adapter, Site]] = {}
    for path, layer in adapted_layers(model):
        home, site = layer.isotune, require_site(layer, path)
        for name, adapter in zip(home.active, home.running(), strict=False):  # nothing runs where they are disabled
            found.setdefault((name, type(adapter)), {})[adapter] = site
            site = AdaptedSite(site, adapter)
    with torch.no_grad():
        for (_, kind), adapters in found.items():
            for parameter in kind.after_steps(adapters, progress):
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
