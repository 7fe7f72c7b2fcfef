"""Random matrices, to start from or drawn once and never trained, as PEFT draws them: a seed gives the same bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Entries drawn from U(-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def kaiming_uniform(
    shape: tuple[int, ...], generator: torch.Generator, slope: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Entries from U(-b, b), `b = √(6 / (1 + slope²) / fan_in)`, where fan_in is the product of all but the first."""
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=slope, generator=generator)


def bfloat_bases(n_out: int, count: int, r: int, n_in: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, 1, n_in) and B (n_out, count, r), uniform, of standard deviation 1; drawn and scaled in bfloat16."""
    options = {"generator": generator, "slope": math.sqrt(5), "dtype": torch.bfloat16}
    A = kaiming_uniform((r, 1, n_in), **options)  # type: ignore[arg-type]
    B = torch.cat([kaiming_uniform((n_out, 1, r), **options) for _ in range(count)], dim=1)  # type: ignore[arg-type]
    return unit_deviation(A), unit_deviation(B)


def ternary_bases(
    n_out: int, count: int, r: int, n_in: int, sparsity: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (r, 1, n_in) and B (n_out, count, r) with entries -1, 0 and 1, scaled to standard deviation 1.

    Each sign has the probability 1 / (2 sparsity). A vector of a basis that came out as zero, as happens in tiny
    layers, gets one entry of 1.
    """
    A, B = (torch.rand(shape, generator=generator) for shape in ((r, 1, n_in), (n_out, count, r)))
    edge = 1 / (2 * sparsity)
    A, B = ((u > 1 - edge).to(u.dtype) - (u < edge).to(u.dtype) for u in (A, B))
    A[..., 0][(A == 0).all(-1)] = 1
    B[0][(B == 0).all(0)] = 1
    return unit_deviation(A), unit_deviation(B)


def unit_deviation(t: Tensor) -> Tensor:
    """t, of any shape and not all zero, divided by the standard deviation of its entries.

    A few entries that happen to lie close together have hardly any: half their root mean square is the least.
    """
    least = t.square().mean().sqrt() / 2
    return t / torch.maximum(t.std(correction=min(1, t.numel() - 1)), least)
