"""Determinants, inverses and solutions of batches of matrices, by LU factorisation, safe with several threads.

torch 2.13's CPU build hands a batch to MKL from several threads at once; from about 128 rows on MKL then reports
wrong parameters and never returns. Larger matrices on the CPU are therefore factorised one after the other, each with
all threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGE = 64
"""Matrices of at most so many rows are factorised as a batch: MKL does not split those among its threads."""


def det(X: Tensor) -> Tensor:
    """The determinants (...) of X (..., k, k)."""
    return _each(torch.linalg.det, X)


def inv(X: Tensor) -> Tensor:
    """The inverses of X (..., k, k)."""
    return _each(torch.linalg.inv, X)


def solve(A: Tensor, B: Tensor) -> Tensor:
    """`A⁻¹ B` for A (..., k, k) and B (..., k, n), with the same leading dimensions."""
    return _each(torch.linalg.solve, A, B)


def _each(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    first = matrices[0]
    if first.dim() == 2 or first.shape[-1] <= _LARGE or first.device.type != "cpu" or not len(first):
        return function(*matrices)
    return torch.stack([_each(function, *parts) for parts in zip(*matrices, strict=True)])
