"""Tensor rings: vectors and matrices whose entries are traces of products of r x r matrices, one for each digit.

    T[i, j] = tr(A_1[i_1, j_1] ... A_D[i_D, j_D]),   i = i_1 + I_1 (i_2 + I_2 (i_3 + ...)),   A_d (I_d x J_d x r x r)

An index counts from its first digit, as little-endian numbers do. T is (Π I_d x Π J_d), and is never formed here but
by `ring_matrix`. Source: Zhao et al., "Tensor Ring Decomposition", 2016, arXiv 1606.05535.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def digit_sizes(n: int, count: int) -> tuple[int, ...]:
    """`count` factors of n, as equal as its primes allow, the largest first; ones where there are too few primes."""
    factors = [1] * count
    for prime in reversed(_primes(n)):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(factors, reverse=True))


def _primes(n: int) -> list[int]:
    """The prime factors of n in ascending order."""
    primes, p = [], 2
    while p * p <= n:
        while n % p == 0:
            primes.append(p)
            n //= p
        p += 1
    return primes + [n] * (n > 1)


def ring_rows(x: Tensor, cores: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """`x Tᵀ`, or `x T`, for rows x (n, d) and D cores: at most 2 n d r³ Σ I_d flops, and n d r² numbers a core.

    The digits of x are exchanged one after another, from the first, while both open ends of the ring are carried.
    """
    if transpose:
        cores = [core.transpose(0, 1) for core in cores]
    n, last = x.shape[0], cores[-1]
    if len(cores) == 1:
        return torch.einsum("nj,ijaa->ni", x, last)
    # t: rows, digits to come, digits done, and the open ends of the ring (a in front, c behind).
    t = torch.einsum("nqj,ijac->nqiac", x.view(n, -1, cores[0].shape[1]), cores[0])
    for core in cores[1:-1]:
        t = t.unflatten(1, (-1, core.shape[1]))
        t = torch.einsum("nqjoab,ijbc->nqioac", t, core).flatten(2, 3)
    return torch.einsum("njoab,ijba->nio", t, last).reshape(n, -1)


def ring_flops(cores: Sequence[Tensor]) -> int:
    """Flops of `ring_rows` for one row and D >= 2 cores (I_d, I_d, r, r): an inner core is met by both open ends."""
    sizes, r = [core.shape[0] for core in cores], cores[0].shape[-1]
    return 2 * math.prod(sizes) * r**2 * (sizes[0] + sizes[-1] + r * sum(sizes[1:-1]))


def ring_products(cores: Sequence[Tensor]) -> Tensor:
    """`B_1[i_1] ... B_D[i_D]` for every index i: (Π I_d, r, r) from cores B_d (I_d x r x r)."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.einsum("oab,ibc->ioac", product, core).flatten(0, 1)
    return product


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """T itself, (Π I_d, Π J_d): the slow twin of `ring_rows`."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.einsum("opab,ijbc->iojpac", product, core).flatten(2, 3).flatten(0, 1)
    return torch.einsum("ijaa->ij", product)
