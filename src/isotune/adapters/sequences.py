"""Batches as sequences of tokens, and which of those are no padding, for methods that count tokens or mix them."""

from __future__ import annotations

from torch import Tensor


def as_sequences(x: Tensor) -> Tensor:
    """x (b, ..., d) as (b, n, d); of rows (b, d) without a dimension for time each is a sequence of its own."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def real_tokens(tokens: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask (b, n) that `isotune.tokens` gave, as booleans; None where x (b, n, d) is no batch of its shape."""
    if tokens is None or tokens.shape != x.shape[:-1]:
        return None
    return tokens.to(x.device).bool()
