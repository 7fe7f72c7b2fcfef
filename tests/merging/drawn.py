"""Drawn changes of a weight, and what a rule makes of them: for the tests of single rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isotune.linalg.change import Change, dense
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule
from isotune.merging.registry import rule


def tensors(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def factored(count: int, m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Factored]:
    """Changes of rank r."""
    left, right = tensors(count, m, r, seed=seed, dtype=dtype), tensors(count, r, n, seed=seed + 1, dtype=dtype)
    return [Factored(B, A) for B, A in zip(left, right, strict=True)]


def factors(
    m: int, n: int, ranks: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Factored]:
    """Factored changes of these ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Factored(
            *(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((m, r), (r, n)))
        )
        for r in ranks
    ]


def site(
    changes: Sequence[Change], weights: Sequence[float] | None = None, names: str = "stuvwxyz", **fields: Any
) -> Aligned:
    """A site with these changes, of models s, t, u, ..., of weight 1 each."""
    weights = [1.0] * len(changes) if weights is None else weights
    return Aligned(fields.pop("path", "a"), tuple(names[: len(changes)]), tuple(changes), tuple(weights), **fields)


def merge(rule: Rule, *sites: Aligned) -> Any:
    """The dense merged changes: one where there is one site."""
    surveyed = rule.survey(iter(sites))
    found = [dense(rule.merge(each, surveyed)) for each in sites]
    return found[0] if len(found) == 1 else found


def merged(name: str, changes: Sequence[Change], weights: Sequence[float] | None = None, **options: Any) -> Tensor:
    """What a rule makes of them, dense and before any rescaling."""
    found = rule(name, **options)
    assert isinstance(found, Rule)
    return dense(found.merge(site(changes, weights), None))


def assert_same(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to a share of the second one's norm."""
    assert one.shape == other.shape
    assert float((one - other).norm()) <= tolerance * max(float(other.norm()), 1e-30)
