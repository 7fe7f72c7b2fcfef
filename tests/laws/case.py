"""One drawn situation in which a law is put to the test: a method's settings, a layer, an input, a seed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn

import isotune
from isotune import Settings
from isotune.adapters import registry
from isotune.adapters.contract import Adapter
from isotune.errors import OptionError
from isotune.model.adapted import Adapted
from isotune.sites import Site, require_site
from laws.layers import drawn_layer, input_for


class Host(nn.Module):
    """A model of one layer, and a second layer tied to its weight, which no adapter may touch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer
        self.tied: Any = copy.deepcopy(layer)
        self.tied.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Case:
    """What a law gets."""

    method: Settings
    layer: nn.Module
    """Bare, in float64."""
    seed: int

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """An input of the layer."""
        return input_for(self.layer, seed=self.seed, dtype=dtype)

    def base(self, dtype: torch.dtype = torch.float64) -> Host:
        """The model without adapters."""
        return Host(copy.deepcopy(self.layer).to(dtype)).eval()

    def fresh(self, dtype: torch.dtype = torch.float64, name: str = "default", seed: int | None = None) -> Host:
        """The model with a fresh adapter."""
        return self.adapt(self.base(dtype), name, self.seed if seed is None else seed)

    def adapt(self, model: Host, name: str, seed: int) -> Host:
        """Put an adapter of the method on the model."""
        isotune.adapt(model, self.method, targets=["layer"], name=name, seed=seed)
        return model.eval()

    def moved(self, dtype: torch.dtype = torch.float64) -> Host:
        """The model with an adapter somewhere off its start, as after training."""
        return move(self.fresh(dtype), self.seed)


def move(model: nn.Module, seed: int = 0) -> Any:
    """Push every trainable parameter of the model away from where it is."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in trainable(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    isotune.after_step(model)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer would get."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_of(model: Host, name: str = "default") -> Adapter:
    """The adapter on the model's layer."""
    assert isinstance(model.layer, Adapted)
    return model.layer.isotune[name]


def site_of_base(model: Host) -> Site:
    """The bare layer as a site."""
    return require_site(model.layer, "layer")


@st.composite
def drawn_case(draw: DrawFn, kind: str, options: Any, declared: Collection[str]) -> Case:
    """A case in which the options fit the layer."""
    settings = draw(options)
    layer = draw(drawn_layer(kind, declared))
    try:
        settings.build(require_site(layer, "layer"), torch.Generator())
    except OptionError:
        reject()
    return Case(settings, layer, draw(st.integers(0, 999)))


@contextmanager
def registered(method: type[Settings]) -> Iterator[None]:
    """Let the registry know a method of a test file, as an installed plug-in would be known."""
    # The second looks through what is installed.
    if method.name in registry.BUILT_IN or method.name in registry.method_names():
        yield
        return
    registry.BUILT_IN[method.name] = f"{method.__module__}:{method.__name__}"
    try:
        yield
    finally:
        del registry.BUILT_IN[method.name]
        registry.method_class.cache_clear()
