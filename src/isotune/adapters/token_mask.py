"""Which tokens of a batch are no padding, for methods that count tokens or mix them."""

from __future__ import annotations

from torch import Tensor


def real_tokens(tokens: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask (b, n) that `isotune.tokens` gave, as booleans; None where x (b, n, d) is no batch of its shape."""
    if tokens is None or tokens.shape != x.shape[:-1]:
        return None
    return tokens.to(x.device).bool()
