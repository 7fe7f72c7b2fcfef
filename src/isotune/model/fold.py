"""Absorb the active adapters into the base weights, and take them out again."""

from __future__ import annotations

from torch import nn

from isotune.errors import IsotuneError
from isotune.model.layers import AdaptedLayer, adapted_layers, check_one_weight, wrappers


def fold(model: nn.Module, keep_base: bool = True) -> nn.Module:
    """Replace each adapted layer's weight by the adapted one, so that the forward pass costs what the base costs.

    With `keep_base` the base weights are kept, and `unfold` restores them bit for bit. Without it the adapters,
    and any inactive ones with them, are gone afterwards: the result is a plain model of the base's classes, ready
    for `save_pretrained`. Modules trained in full take the place of the originals. Raises IsotuneError where
    nothing is active, the model is folded already, a weight is packed, or rows of a batch use different adapters;
    nothing is folded then.
    """
    layers = list(adapted_layers(model))
    if any(layer.folded for _, layer in layers):
        raise IsotuneError("the model's adapters are already folded; call unfold first")
    if not any(wrapper.running() for _, wrapper in wrappers(model)):
        raise IsotuneError("no adapter is active, so there is nothing to fold; choose some with isotune.use")
    check_one_weight(model, "fold")
    if packed := [path for path, layer in layers if layer.running() and layer.bare.packed]:
        raise IsotuneError(
            f"{', '.join(packed[:3])}{', ...' if packed[3:] else ''} cannot be folded: a quantised or packed weight "
            "cannot hold the adapted one exactly; run with the adapter beside it, or fold on the unquantised base"
        )
    for _, layer in layers:
        if layer.running():
            layer.fold(keep_base)
    if not keep_base:
        for _, wrapper in list(wrappers(model)):
            wrapper.leave(model, None if isinstance(wrapper, AdaptedLayer) else wrapper.current)
    return model


def unfold(model: nn.Module) -> nn.Module:
    """Undo `fold`: the base weights are restored bit for bit and the adapters run beside them again.

    Raises IsotuneError where nothing is folded.
    """
    folded = [layer for _, layer in adapted_layers(model) if layer.folded]
    if not folded:
        raise IsotuneError("nothing to unfold: no adapter is folded with keep_base=True")
    for layer in folded:
        layer.unfold()
    return model
