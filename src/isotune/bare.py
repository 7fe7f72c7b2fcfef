"""A layer as it is without adapters: its class, its tensors, its forward.

An adapted layer keeps its place and its parameters, but its class is an extended one (`model/adapted.py`): whoever
wants what the base has must not ask the layer itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

HOME = "isotune"
"""The name under which a module holds its adapters."""


def bare_class(layer: nn.Module) -> type[nn.Module]:
    """The class of the layer as it is without adapters."""
    return getattr(type(layer), "base_class", type(layer))


def bare(layer: nn.Module, name: str) -> Any:
    """A tensor of the layer as it is without adapters, or None."""
    parameters = layer._parameters
    if name in parameters and (parameters[name] is not None or name not in layer.__dict__):
        return parameters[name]
    if not getattr(type(layer), "answers", False):
        try:
            return getattr(layer, name)
        except AttributeError:
            return None
    # What answers for the adapted layer hides what parametrizations, or an older weight_norm, put in its place.
    own: Any = getattr(bare_class(layer), name, None)
    return own.__get__(layer) if isinstance(own, property) else layer.__dict__.get(name)


def own_forward(layer: nn.Module) -> Any:
    """A forward that was put on the layer itself before its adapters came, as accelerate does; else None."""
    home: Any = layer._modules.get(HOME)
    return layer.__dict__.get("forward") if home is None else home.own_forward


def bare_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the layer's own forward, without adapters and hooks."""
    own = own_forward(layer)
    if own is not None:
        return own(*args, **kwargs)
    if bare_class(layer).forward is not nn.Sequential.forward:
        return bare_class(layer).forward(layer, *args, **kwargs)
    (x,) = (*args, *kwargs.values())  # its own forward would run its adapters as one of its modules
    for name, module in layer._modules.items():
        if name != HOME and module is not None:
            x = module(x)
    return x
