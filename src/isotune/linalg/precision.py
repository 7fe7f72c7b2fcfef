"""The dtype that small algebra runs in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is fp32 or fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
