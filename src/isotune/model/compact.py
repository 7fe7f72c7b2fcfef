"""Make of an adapter the exact LoRA that it is, with no more ranks than are in use."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import LoRA, LoRAAdapter
from isotune.errors import IsotuneError, NoLowRankFormError
from isotune.linalg.precision import at_least_fp32
from isotune.model.adapted import Adapted
from isotune.model.names import adapted_layers, changed_modules
from isotune.model.parametrized import take_off
from isotune.model.switch import adapter_names
from isotune.sites import require_site


def compact(model: nn.Module, name: str | None = None) -> nn.Module:
    """Replace an adapter by the exact LoRA that it is, in place: the same outputs, the ranks that are in use.

    What SoRA or AdaLoRA gave up is gone then, and layers that it changes no more are as they were. Training goes on
    as that of a LoRA; an optimizer has to be made anew.

    Args:
        model: A model with adapters.
        name: The adapter; by default the only one that there is.

    Returns:
        The same model.

    Raises:
        IsotuneError: An unknown name, none where there are several, or adapters that are folded.
        NoLowRankFormError: A layer's change is no exact LoRA. The model is then as it was.
    """
    name = _chosen(model, name)
    layers = {path: layer for path, layer in adapted_layers(model) if name in layer.isotune}
    found = {path: _factors(path, layer, name) for path, layer in layers.items()}
    for path, layer in layers.items():
        B, A = found[path]
        home = layer.isotune
        trains = any(p.requires_grad for p in home[name].parameters())
        home.inference, home.refused = None, ()
        if B.shape[1]:
            home[name] = LoRAAdapter(A, B).train(layer.training).requires_grad_(trains)
            home.settings[name] = LoRA(rank=B.shape[1])
            continue
        del home[name], home.settings[name]
        home.active = tuple(other for other in home.active if other != name)
        if not home:
            take_off(layer)
    return model


def _chosen(model: nn.Module, name: str | None) -> str:
    known = adapter_names(model)
    if any(module.isotune.folded or module.isotune.routing for _, module in changed_modules(model)):
        raise IsotuneError("the adapters are folded into the weights, or differ by row; undo that first")
    if name is None and len(known) == 1:
        return known[0]
    if name not in known:
        what = f"no adapter {name!r}" if name is not None else "the model has several adapters, or none: name one"
        raise IsotuneError(f"{what}; the model has: {', '.join(known) or 'none'}")
    return name


@torch.no_grad()
def _factors(path: str, layer: Adapted, name: str) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of the adapter's change, without the ranks that change nothing."""
    site, adapter = require_site(layer, path), cast(Adapter, layer.isotune[name])
    pair = adapter.factors(at_least_fp32(site.weight)) if adapter.has_weight else None
    if pair is None or adapter.bias(site.bias) is not site.bias:
        raise NoLowRankFormError(
            f"{adapter.method} at {path!r} is no exact LoRA, so that it cannot be made a smaller one; isotune.fold "
            "adds it to the weights"
        )
    B, A = pair
    used = (B != 0).any(0) & (A != 0).any(1)
    return B[:, used].clone(), A[used].clone()
