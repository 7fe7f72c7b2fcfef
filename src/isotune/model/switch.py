"""Choose which adapters run and train, and ask a model about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isotune.adapters.contract import Adapter
from isotune.errors import IsotuneError, nearest
from isotune.matrix import Matrix
from isotune.model.adapted import Adapted
from isotune.model.names import adapted_layers, changed_modules
from isotune.model.mixed import thin_of
from isotune.packed import is_packed
from isotune.sites import device_of, require_site


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
            next call. The adapters must be of one method; `train` then means those named here.
        train: Which of them learn: all, none, or those named.

    Returns:
        The same model.

    Raises:
        IsotuneError: An unknown name, adapters folded into the weights, or rows that cannot share a batch. The model
            is then as it was.
    """
    if rows is not None and names:
        raise IsotuneError("use takes the names of adapters to stack, or rows=[...], not both")
    names = names if rows is None else tuple(dict.fromkeys(name for name in rows if name is not None))
    known = adapter_names(model)
    learning = (names if train else ()) if isinstance(train, bool) else tuple(train)
    for name in (*names, *learning):
        if name not in known:
            there = ", ".join(known) or "none"
            raise IsotuneError(f"no adapter {name!r} on this model.{nearest(name, known)} It has: {there}.")
    if any(module.isotune.folded for _, module in changed_modules(model)):
        raise IsotuneError("the active adapters are folded into the weights; call unfold before switching")
    if rows is not None:
        _check_rows(model, names)
    for _, module in changed_modules(model):
        home = module.isotune
        home.active = active = tuple(name for name in names if name in home)
        home.rows = None
        if rows is not None and active:
            places = [active.index(name) if name in active else len(active) for name in rows]
            home.rows = torch.tensor(places, device=device_of(module))
        for name, part in home.items():
            part.requires_grad_(name in names and name in learning)
    return model


@torch.no_grad()
def _check_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Raise IsotuneError unless rows of one batch can use these adapters."""
    for path, module in changed_modules(model):
        parts = [name for name in names if name in module.isotune]
        if not parts:
            continue
        if not isinstance(module, Adapted):
            raise IsotuneError(f"{parts[0]!r} trains {path!r} in full, which the rows of a batch must share")
        if isinstance(module, Matrix):
            raise IsotuneError(f"{parts[0]!r} changes {path!r}, a parameter, which the rows of a batch must share")
        site = require_site(module, path)
        layouts = {((a := module.isotune[name]).method, thin_of(a, site).where): name for name in parts}
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
    rows = []
    for path, module in changed:
        home = module.isotune
        for name, part in home.items():
            trainable = sum(p.numel() for p in part.parameters())
            method = home.settings[name].name if name in home.settings else "full"
            rows.append(SiteRow(path, name, method, trainable, trainable / max(base, 1), name in home.active))
    return rows


def penalty(model: nn.Module) -> Tensor:
    """The sum of the active adapters' penalties, a scalar to add to the loss."""
    terms = [_penalty(adapter) for _, layer in adapted_layers(model) for adapter in layer.isotune.running()]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


class _Penalty(nn.Module):
    """An adapter's penalty as a module's forward, so that it can be computed with other parameters."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.penalty()


def _penalty(adapter: Adapter) -> Tensor:
    """The adapter's penalty, over the whole of its parameters where FSDP has sharded them."""
    whole = {f"adapter.{n}": p.full_tensor() for n, p in adapter.named_parameters() if hasattr(p, "full_tensor")}
    return functional_call(_Penalty(adapter), whole, ()) if whole else adapter.penalty()


def learning_rate_factors(model: nn.Module) -> dict[nn.Parameter, float]:
    """The factors that the active adapters' methods put on the learning rate of some of their parameters.

    For an optimizer of your own: `{"params": [p], "lr": factor * lr} for p, factor in ...`, besides the others.
    """
    return {
        adapter.get_parameter(name): factor
        for _, layer in adapted_layers(model)
        for adapter in layer.isotune.running()
        for name, factor in adapter.learning_rates().items()
        if factor != 1
    }


def after_step(model: nn.Module) -> None:
    """Let the active adapters do what their method does after each optimizer step."""
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for adapter in layer.isotune.running():
                adapter.after_step()
