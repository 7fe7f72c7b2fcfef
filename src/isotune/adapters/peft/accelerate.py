"""PEFT's own models, run with isotune's arithmetic."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from isotune.errors import IsotuneError, IsotuneWarning


def accelerate_peft(model: nn.Module, undo: bool = False) -> nn.Module:
    """Run PEFT's HRA and BOFT layers without dense rotations, in place, with the same results to rounding.

    Only the class of each layer changes, to a subclass of PEFT's own with another `forward`: parameters, state dicts,
    saving, merging, switching and disabling are PEFT's as before, and so are adapters added later. Layers of other
    methods are left as they are, also those of OFT, which PEFT computes block by block itself. BOFT with
    `boft_dropout` keeps PEFT's arithmetic while training, because PEFT draws the blocks to drop.

    PEFT computes some convolutions otherwise than the base layer does (it ignores dilation and padding mode, and
    takes kernel, stride and padding to be square). Those keep PEFT's arithmetic, so that no result changes, and one
    warning names them.

    Args:
        model: A model that PEFT has put adapters on (`get_peft_model`, `PeftModel.from_pretrained`, `add_adapter`).
        undo: Give the layers PEFT's arithmetic back.

    Returns:
        The same model.

    Raises:
        IsotuneError: PEFT is not installed, or no layer of the model has an adapter of PEFT's.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer

        from isotune.adapters.peft.layers import FAST
    except ImportError as error:
        raise IsotuneError(
            f"accelerate_peft needs PEFT ({error}); install it with: pip install isotune[peft]"
        ) from None
    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        raise IsotuneError("no layer of this model has an adapter of PEFT's; put one on it with peft.get_peft_model")
    if undo:
        _swap(layers, {fast: own for own, fast in FAST.items()})
        return model
    left = {path: why for path, layer in layers.items() if type(layer) in FAST and (why := _differs(layer))}
    _swap({path: layer for path, layer in layers.items() if path not in left}, FAST)
    if left:
        named = "; ".join(f"{path} ({why})" for path, why in left.items())
        warnings.warn(
            f"PEFT computes another convolution than the base layer does, so these keep its arithmetic: {named}",
            IsotuneWarning,
            stacklevel=2,
        )
    return model


def _swap(layers: dict[str, Any], classes: dict[type, type]) -> None:
    for layer in layers.values():
        # By exact class: a subclass of someone else's computes something else.
        layer.__class__ = classes.get(type(layer), type(layer))


def _differs(layer: Any) -> str | None:
    """In what PEFT's HRA and BOFT leave the base layer's convolution; None where it does not."""
    conv = layer.get_base_layer()
    if not isinstance(conv, nn.Conv2d):
        return None
    if any(step != 1 for step in conv.dilation):
        return f"dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        return f"padding {conv.padding!r}"
    pairs = {"kernel": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
    return next((f"{name} {pair}" for name, pair in pairs.items() if pair[0] != pair[1]), None)
