"""Drawn changes of one weight, for tests of single rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isotune.linalg.change import Change, dense
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule
from isotune.merging.registry import rule


def matrices(m: int, n: int, count: int, seed: int = 0) -> list[Tensor]:
    """Dense changes of full rank, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(count)]


def factors(
    m: int, n: int, ranks: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Factored]:
    """Factored changes of these ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Factored(
            torch.randn(m, r, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype),
        )
        for r in ranks
    ]


def site_of(changes: Sequence[Change], weights: Sequence[float] | None = None, matrix: bool = True) -> Aligned:
    """These changes of one weight, by models 0, 1, …"""
    names = tuple(str(index) for index in range(len(changes)))
    return Aligned("w", names, tuple(changes), tuple(weights or [1.0] * len(changes)), matrix)


def merged(name: str, changes: Sequence[Change], weights: Sequence[float] | None = None, **options: Any) -> Tensor:
    """What a rule makes of them, dense and before any rescaling."""
    found = rule(name, **options)
    assert isinstance(found, Rule)
    return dense(found.merge(site_of(changes, weights), None))


def assert_same(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to a share of the second one's norm."""
    assert one.shape == other.shape
    assert float((one - other).norm()) <= tolerance * max(float(other.norm()), 1e-30)
