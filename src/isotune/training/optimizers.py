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
_AS_ADAMW = {"adjust_lr_fn": "match_rms_adamw"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": _AS_ADAMW,
    "normuon": _AS_ADAMW,
    "trion": _AS_ADAMW,
    "scion": {"unconstrained": True},
}
"""Where recipes depart from the classes: steps as large as AdamW's, and none towards zero for what is pretrained."""


def check_optimizer(recipe: Recipe) -> None:
    """Raise IsotuneError for an unknown optimizer or option, and for what a trainer cannot do."""
    if recipe.optimizer is None:
        return
    name, options = _split(recipe.optimizer)
    cls = optimizer_class(name)
    if "optim" in recipe.training:
        raise IsotuneError(
            f"optimizer is {name}, and training.optim {recipe.training['optim']!r}: leave one of them out"
        )
    if name == "scion_light":
        raise IsotuneError("scion_light remembers in gradients, which a trainer sets to zero: use optimizer: scion")
    if options.get("integrator", "euler") != "euler":
        raise IsotuneError(
            "optimizer.integrator: a trainer computes one gradient a step, as euler does: leave it out"
        )
    known = {key for base in cls.__mro__[:2] for key in inspect.signature(base).parameters}
    known -= {*_DECIDED, "process_group", "options", "defaults"}
    for key in options:
        if key in _DECIDED:
            raise OptionError(f"optimizer.{key} is decided elsewhere: use {_DECIDED[key]}")
        if key not in known:
            raise OptionError(
                f"unknown key 'optimizer.{key}'.{nearest(key, known)} {name} has: {', '.join(sorted(known))}"
            )
    shapes = [(2, 3), (4, 2)]  # of a pair
    try:
        cls([nn.Parameter(torch.zeros(shape)) for shape in shapes], **options)
    except (ValueError, TypeError) as error:
        raise OptionError(f"optimizer {name}: {error}") from None


def build_optimizer(
    model: nn.Module, chosen: Mapping[str, Any], lr: float, weight_decay: float, without_decay: set[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names for what trains in the model; some of which is to have no weight decay."""
    name, options = _split(chosen)
    groups = []
    for group in parameter_groups(model, lr, weight_decay, algorithm=name):
        for free in (False, True):
            own = [p for p in group["params"] if (p in without_decay) is free]
            if own:
                groups.append({**group, "params": own} | ({"weight_decay": 0.0} if free else {}))
    optimizer = optimizer_class(name)(groups, lr=lr, **options)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _split(chosen: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name, and the options with our defaults for recipes."""
    name = chosen["name"]
    given = {key: value for key, value in chosen.items() if key != "name"}
    return name, DEFAULTS.get(name, {}) | given
