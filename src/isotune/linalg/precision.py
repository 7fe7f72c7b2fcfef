"""The dtype that small algebra runs in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x`, of any shape, in fp32, or as it is when it is fp32 or fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(pair: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Two tensors of any shape in this dtype, or as they are where it is None."""
    return pair if dtype is None else (pair[0].to(dtype), pair[1].to(dtype))


def autocast(x: Tensor) -> Tensor:
    """`x`, of any shape, in the dtype that autocast would compute in, where it is on; indices stay as they are."""
    return x.to(compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that what is computed from x, of any shape, is computed in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
