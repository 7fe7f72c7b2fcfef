"""Weights that are no dense floating-point tensors: quantised and packed by other libraries.

A layer with such a weight (torchao, bitsandbytes, fp8) trains and runs through its own forward. Only export and the
diagnostics of a change ask for its weight, which then comes dequantised from `dequantized`, the one place that knows
how the libraries do it.
"""

from __future__ import annotations

import copy
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
            import bitsandbytes.functional as library
        except ImportError:
            pass
        else:
            packed = weight.detach()
            if getattr(state, "packing_format_for_cpu", False):  # by an evaluation on a CPU
                packed, state = library._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
            return library.dequantize_4bit(packed, state)
    elif isinstance(weight, Tensor) and (_unpacks_itself(weight) or weight.is_quantized):
        return weight.detach().dequantize()
    elif (scale := _row_scale(layer, weight)) is not None:
        return weight.detach().to(torch.float32) * (scale.detach().to(torch.float32) / 127)[:, None]
    raise TargetError(
        f"the weight of a {bare_class(layer).__name__} ({layer.in_features} -> {layer.out_features}) is packed, and "
        "there is no known way to dequantise it; training, saving and loading work without it, and for anything else "
        "put the adapter on the unquantised base model"
    )


def _row_scale(layer: Any, weight: Any) -> Tensor | None:
    """The largest value of each row (out) of a weight in bitsandbytes' int8, which its forward moves to the layer."""
    for holder in (weight, getattr(layer, "state", None)):
        if isinstance(scale := getattr(holder, "SCB", None), Tensor) and weight.dtype == torch.int8:
            return scale
    return None


def _weight_of(layer: Any) -> Any:
    try:
        return bare(layer, "weight")
    except (AttributeError, RuntimeError):  # a layer that has none, or refuses to show it
        return None


def _unpacks_itself(weight: Tensor) -> bool:
    # Every tensor has the method; the subclasses of torchao have one of their own.
    return type(weight).dequantize is not Tensor.dequantize
