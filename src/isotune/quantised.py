"""Weights that are no dense floating-point tensors: quantised and packed by other libraries.

A layer with such a weight (torchao, bitsandbytes, fp8) trains and runs through its own forward. Only export and the
diagnostics of a change ask for its weight, which then comes dequantised from `dequantized`, the one place that knows
how the libraries do it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.bare import bare, bare_class
from isotune.errors import TargetError

DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_packed(layer: nn.Module) -> bool:
    """Whether only the layer's own forward understands its weight: integers, fp8, a quantised tensor, or none."""
    weight = _weight_of(layer)
    return not isinstance(weight, Tensor) or weight.dtype not in DENSE or _unpacks_itself(weight)


def dequantized(layer: nn.Module) -> Tensor:
    """The weight that the layer's forward stands for, dense, in the layer's own shape, detached from autograd.

    Raises TargetError where the library that packed it offers no way to have it.
    """
    weight: Any = _weight_of(layer)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        try:
            from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            pass
        else:
            return dequantize_4bit(weight.detach(), state)
    elif isinstance(weight, Tensor) and (_unpacks_itself(weight) or weight.is_quantized):
        return weight.detach().dequantize()
    raise TargetError(
        f"the weight of a {bare_class(layer).__name__} ({layer.in_features} -> {layer.out_features}) is packed, and "
        "there is no known way to dequantise it; training, saving and loading work without it, and for anything else "
        "put the adapter on the unquantised base model"
    )


def _weight_of(layer: Any) -> Any:
    try:
        return bare(layer, "weight")
    except (AttributeError, RuntimeError):  # a layer that has none, or refuses to show it
        return None


def _unpacks_itself(weight: Tensor) -> bool:
    # Every tensor has the method; the subclasses of torchao have one of their own.
    return type(weight).dequantize is not Tensor.dequantize
