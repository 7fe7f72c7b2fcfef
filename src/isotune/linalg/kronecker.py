"""Kronecker products of small square matrices, applied to rows one factor at a time.

    v (Q_1 ⊗ Q_2 ⊗ ...),   Q_i (c_i x c_i),   d = c_1 c_2 ...

Cost for n rows: 2 n d (c_1 + c_2 + ...) flops, in place of 2 n d² for the dense product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from isotune.linalg.thin import without_autocast


def rotate_kronecker(v: Tensor, factors: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """`v (Q_1 ⊗ Q_2 ⊗ ...)`, or `v (...)ᵀ`, for rows v (..., d), in v's dtype: one product for each mode."""
    shape, behind = v.shape, v.shape[-1]
    for Q in factors:
        behind //= Q.shape[0]
        left = Q if transpose else Q.mT
        with without_autocast(v):
            v = left.to(v.dtype) @ v.reshape(-1, Q.shape[0], behind)
    return v.reshape(shape)


def balanced_factors(n: int, count: int) -> tuple[int, ...]:
    """At most `count` factors of n >= 2, above 1 and ascending, with the smallest sum; n alone where it is prime."""
    return min(_factorings(n, count, 2), key=lambda factors: (sum(factors), -len(factors)))


def _factorings(n: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """The ways to write n as a product of at most `count` ascending factors from `least` on."""
    yield (n,)
    for first in range(least, math.isqrt(n) + 1) if count > 1 else ():
        if n % first == 0:
            for others in _factorings(n // first, count - 1, first):
                yield (first, *others)
