"""How large a change is: its norm, its rank, and how many directions carry it."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(values: Tensor) -> float:
    """`exp(-Σ p_i ln p_i)` with `p_i = s_i / Σ s`, of singular values s (k): r where r are equal, 0 for none.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """
    p = values.double()
    p = p[p > 0]
    if len(p) == 0:
        return 0.0
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def numerical_rank(values: Tensor, scale: float) -> int:
    """How many singular values (k) of a change are more than rounding of a weight of the norm `scale`."""
    # What rounding alone leaves of a change that cancels is no rank.
    return int((values > 10 * torch.finfo(values.dtype).eps * scale).sum())
