"""The modules that stand where an adapted layer, or a module trained in full, stood in the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from isotune.adapted_site import AdaptedSite
from isotune.adapters.contract import Adapter
from isotune.adapters.settings import Settings
from isotune.errors import IsotuneError
from isotune.model.mixed import mixed_forward
from isotune.sites import Site, require_site


class _Wrapper(nn.Module):
    """A layer of the base model with what adapters add to it; answers for the layer wherever it is asked.

    `parts` holds one module for each adapter by name, `active` the names in use, in order.
    """

    parts: nn.ModuleDict
    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        # Where the rows of a batch use different adapters: for each row, which of `active` (past the end: none).
        self.rows: Tensor | None = None
        self.enabled = True
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The model's own code may reach for the layer's attributes (bias, in_features, ...).
            return getattr(super().__getattr__("base_layer"), name)

    def running(self) -> list[Any]:
        """The parts that take part in the forward pass, in order."""
        return [self.parts[name] for name in self.active] if self.enabled else []

    def leave(self, model: nn.Module, successor: nn.Module | None = None) -> None:
        """Give the place in the model to `successor`, by default back to the layer."""
        replace_module(model, self, self.base_layer if successor is None else successor)


class AdaptedLayer(_Wrapper):
    """A frozen layer and its adapters (`parts`), stacked in the order of `active`."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        require_site(base_layer, name)
        super().__init__(base_layer)
        self.settings: dict[str, Settings] = {}
        self.folded = False
        # Weight and bias kept for unfolding: in a list, so that they are no parameters of the model.
        self.kept: list[nn.Parameter | None] = []

    @property
    def bare(self) -> Site:
        """The layer without adapters, as a site."""
        return require_site(self.base_layer, "")

    @property
    def site(self) -> Site:
        """The layer with its running adapters, as a site. Raises IsotuneError where they differ by row."""
        if self.rows is not None and self.enabled:
            raise IsotuneError(
                "the rows of a batch use different adapters, so that a layer has no one adapted weight"
            )
        site = self.bare
        if not self.folded:
            for adapter in self.running():
                site = AdaptedSite(site, adapter)
        return site

    @property
    def weight(self) -> Tensor:
        """The adapted weight in the layer's own shape and dtype; the base's own parameter where nothing is active.

        Over a packed base it is dense, in fp32. Raises TargetError where the base cannot be dequantised.
        """
        site = self.site
        if not isinstance(site, AdaptedSite):
            return self.base_layer.weight
        W = site.layout(site.weight)
        return W if site.packed else W.to(self.base_layer.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The adapted bias; the base's own parameter where nothing is active."""
        return self.bare.bias if self.rows is not None else self.site.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None and self.enabled:
            return mixed_forward(x, self.bare, self.running(), self.rows)
        return self.site(x)

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name."""
        return cast(Adapter, self.parts[name])

    def add(self, name: str, adapter: Adapter, settings: Settings) -> None:
        """Attach an adapter, not yet active."""
        self.parts[name] = adapter
        self.settings[name] = settings

    def fold(self, keep_base: bool) -> None:
        """Put the adapted weight in the place of the base weight."""
        site, old = self.site, self.base_layer.weight
        old_bias, bias = self.bare.bias, site.bias
        with torch.no_grad():
            folded = site.layout(site.weight).to(old.dtype).contiguous()
        # A new parameter, so that a weight tied to this one elsewhere in the model keeps its value.
        self.base_layer.weight = nn.Parameter(folded, requires_grad=False)
        if bias is not old_bias:
            self.base_layer.bias = None if bias is None else nn.Parameter(bias.detach().to(old.dtype), False)
        if keep_base:
            self.kept = [old, cast(nn.Parameter | None, old_bias)]
        self.folded = True

    def unfold(self) -> None:
        """Put the kept base weight back, bit for bit."""
        device = self.base_layer.weight.device
        for name, kept in zip(("weight", "bias"), self.kept, strict=True):
            if kept is not None and kept.device != device:
                kept.data = kept.data.to(device)
            if getattr(self.base_layer, name, None) is not kept:
                setattr(self.base_layer, name, kept)
        self.kept.clear()
        self.folded = False


class TrainedModule(_Wrapper):
    """A module and the copies of it (`parts`) that adapters train in full; the last active one runs."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer)

    @property
    def current(self) -> nn.Module:
        """The copy in use, or the original."""
        running = self.running()
        return running[-1] if running else self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(self.current, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def add(self, name: str) -> None:
        """Attach a copy of the module as it runs now, not yet active."""
        self.parts[name] = copy.deepcopy(self.base_layer)


class Parametrized(nn.Module):
    """Stands among the parametrizations of a parameter; `matrices` has the wrapper of each adapted matrix in it.

    The key is the index of an expert's matrix, and otherwise no number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ModuleDict()


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The adapted layers of a model with their paths in the base model."""
    for path, module in base_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path, module


def trained_modules(model: nn.Module) -> Iterator[tuple[str, TrainedModule]]:
    """The modules that adapters train in full, with their paths in the base model."""
    for path, module in base_modules(model):
        if isinstance(module, TrainedModule):
            yield path, module


def wrappers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer | TrainedModule]]:
    """Everything that stands in for a module of the base model, with its path."""
    for path, module in base_modules(model):
        if isinstance(module, AdaptedLayer | TrainedModule):
            yield path, module


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the model as if it had no adapters: wrappers appear under the path of what they wrap, not opened."""
    yield prefix, model
    if isinstance(model, _Wrapper):
        return
    for name, child in _base_children(model):
        yield from base_modules(child, f"{prefix}.{name}" if prefix else name)


def _base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children by name; the wrappers of a parameter's matrices as if they were children of that name."""
    for name, child in module.named_children():
        chains = list(child.children()) if name == "parametrizations" else []
        if not any(isinstance(next(chain.children(), None), Parametrized) for chain in chains):
            yield name, child
            continue
        for key, chain in child.named_children():
            first = next(chain.children(), None)
            if not isinstance(first, Parametrized):
                yield f"{name}.{key}", chain
                continue
            for index, wrapper in first.matrices.items():
                yield f"{key}.{index}" if index.isdigit() else key, wrapper


def check_one_weight(model: nn.Module, what: str) -> None:
    """Raise IsotuneError where the rows of a batch use different adapters, so that there is not one weight."""
    if any(layer.rows is not None for _, layer in adapted_layers(model)):
        raise IsotuneError(
            f"there is not one weight to {what}: the rows of a batch use different adapters; "
            "choose one first, with isotune.use(model, name)"
        )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` everywhere that `old` stands in the model (a shared layer stands in several places)."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        # Not named_children(), which names a layer that is shared within one parent only once.
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
