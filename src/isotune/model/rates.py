"""How fast what trains may go, so that a learning rate which suits one model suits another.

A step of Adam is as large in every number whatever a parameter means: how far it turns a weight depends on widths,
ranks and lengths (`Adapter.strides`), and how far the model goes on how many layers change at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from isotune.adapters.contract import Adapter, Treatment
from isotune.model.adapted import current
from isotune.model.names import adapted_layers, trained_modules
from isotune.sites import Site

_NARROW = 32
"""Rank up to which a matrix trained in full takes the adapters' steps; a step of a larger one goes further."""


def treatments(model: nn.Module) -> dict[nn.Parameter, Treatment]:
    """How the parameters that train want to be treated by an optimizer; those in the usual way are not in it.

    Adapters get a factor on the learning rate with which a step changes the model as far as it does where the rate is
    known to suit, whatever their number, and of rotations their widths and ranks; matrices trained in full take
    smaller steps.
    """
    adapters = running_adapters(model)
    found, share = {}, crowding(len(adapters))
    for adapter in adapters:
        own = adapter.parameter_groups()
        for name, parameter in adapter.named_parameters():
            how = own.get(name, Treatment())
            factor = 1 / (share * adapter.stride.get(name, 1.0))
            found[parameter] = how._replace(rate=float(f"{how.rate * factor:.4g}"))
    for _, module in trained_modules(model):
        for parameter in current(module).parameters():
            if parameter.dim() > 1 and (side := min(len(parameter), parameter[0].numel())) > _NARROW:
                found[parameter] = Treatment(rate=_NARROW / side)
    return {parameter: how for parameter, how in found.items() if how != Treatment()}


def running_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters in use, on all layers."""
    return [adapter for _, layer in adapted_layers(model) for adapter in layer.isotune.running()]


def choose_lengths(adapters: Mapping[str, Adapter], sites: Mapping[str, Site]) -> None:
    """Let what has no meaning but its direction start so long that no optimizer's step turns it further than is good.

    Nothing is shortened: the steps of SGD grow with the square of what Adam's grow with.
    """
    strides = {path: adapter.strides(sites[path]) for path, adapter in adapters.items()}
    share = crowding(len(adapters))
    for path, adapter in adapters.items():
        for name in adapter.lengthless:
            adapter.get_parameter(name).detach().mul_(max(strides[path][name] * share, 1.0))


def crowding(count: int) -> float:
    """How much further a step takes a model with so many adapters than one with the twelve of reference.

    What they change adds up as a random walk does. Fewer than twelve get no larger steps.
    """
    return math.sqrt(max(count, 12) / 12)
