"""The optimizer of a run: isotune's, where a recipe names one of them, beside those of `training.optim`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isotune.errors import IsotuneError, OptionError, nearest
from isotune.model.groups import parameter_groups
from isotune.optim.names import optimizer_class
from isotune.training.recipe import Recipe

_DECIDED = {"params": "nothing", "lr": "training.learning_rate", "weight_decay": "training.weight_decay"}
"""What a recipe says elsewhere, or not at all."""
_LARGE: dict[str, Any] = {"adjust_lr_fn": "rms"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": _LARGE,
    "normuon": _LARGE,
    "trion": _LARGE,
    "auon": _LARGE,
    "hybrid_auon": _LARGE,
    "conda": {"scale": 1.0},
    "scion": {"unconstrained": True},
}
"""Where recipes depart from the classes: steps as large as AdamW's, and none towards zero for what is pretrained."""
_RATES = {"adarem": 60.0, "odelora": 10.0, "scion": 2.0}
"""Factors on a method's learning rate, for optimizers whose steps are of another size than AdamW's."""


def checked_optimizer(value: str | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]] | None:
    """An optimizer's name and its options, with our defaults for recipes; None where AdamW is meant.

    Raises OptionError for an unknown name or option, and IsotuneError for what a trainer cannot do.
    """
    if value is None:
        return None
    chosen = {"name": value} if isinstance(value, str) else dict(value)
    name = chosen.pop("name", None)
    if not isinstance(name, str):
        raise OptionError("an optimizer needs a name, such as {name: muon, momentum: 0.9}")
    cls, options = optimizer_class(name), DEFAULTS.get(name, {}) | chosen
    if name == "scion_light":
        raise IsotuneError("scion_light remembers in gradients, which a trainer sets to zero: use optimizer: scion")
    if options.get("integrator", "euler") != "euler":
        raise IsotuneError("optimizer.integrator: a trainer has one gradient a step, as euler wants: leave it out")
    known = {key for base in cls.__mro__[:2] for key in inspect.signature(base).parameters}
    known -= {*_DECIDED, "process_group", "options", "defaults"}
    for key in options:
        if key in _DECIDED:
            raise OptionError(f"optimizer.{key} is decided elsewhere: use {_DECIDED[key]}")
        if key not in known:
            listed = ", ".join(sorted(known))
            raise OptionError(f"unknown key 'optimizer.{key}'.{nearest(key, known)} {name} has: {listed}")
    shapes = [(2, 3), (4, 2)]  # of a pair
    try:
        cls([nn.Parameter(torch.zeros(shape)) for shape in shapes], **options)
    except (ValueError, TypeError) as error:
        raise OptionError(f"optimizer {name}: {error}") from None
    return name, options


def check_optimizer(recipe: Recipe) -> None:
    """Raise IsotuneError for an optimizer of a recipe that cannot be used."""
    found = checked_optimizer(recipe.optimizer)
    if found is not None and "optim" in recipe.training:
        other = recipe.training["optim"]
        raise IsotuneError(f"optimizer is {found[0]}, and training.optim {other!r}: leave one of them out")


def rate_factor(value: str | Mapping[str, Any] | None) -> float:
    """What a learning rate that suits AdamW is multiplied with for an optimizer of a recipe."""
    found = checked_optimizer(value)
    return 1.0 if found is None else _RATES.get(found[0], 1.0)


def build_optimizer(
    model: nn.Module, chosen: Mapping[str, Any], lr: float, weight_decay: float, without_decay: set[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names for what trains in the model; some of which is to have no weight decay."""
    found = checked_optimizer(chosen)
    assert found is not None
    name, options = found
    groups = []
    for group in parameter_groups(model, lr, weight_decay, algorithm=name):
        for free in (False, True):
            own = [p for p in group["params"] if (p in without_decay) is free]
            if own:
                groups.append({**group, "params": own} | ({"weight_decay": 0.0} if free else {}))
    optimizer = optimizer_class(name)(groups, lr=lr, **options)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
