"""The dtype that small algebra runs in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x`, of any shape, in fp32, or as it is when it is fp32 or fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(x: Tensor) -> Tensor:
    """`x`, of any shape, in the dtype that autocast would compute in, where it is on; indices stay as they are."""
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
