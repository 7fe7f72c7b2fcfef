"""Products with a matrix that has few entries, given as its rows, columns and values; entries at one place add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from isotune.linalg.autograd import Node


def scattered(values: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix S (m x n) itself."""
    return values.new_zeros(shape).index_put((rows, cols), values, accumulate=True)


def sparse_product(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, m: int) -> Tensor:
    """`x Sᵀ` for rows x (b, n) and S (m x n) with k entries: 2 b k flops.

    Saved for backward: x and the entries, and not the b k products.
    """
    return _SparseProduct.run(x, values, rows, cols, m)


def largest_of_all(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Where the k largest entries of all of these tensors, of any shapes, are: exactly k, of equal ones the first."""
    flat = torch.cat([t.flatten().to(tensors[0].device) for t in tensors])
    kept = torch.ones_like(flat, dtype=torch.bool)
    if k < len(flat):
        least = flat.kthvalue(len(flat) - k + 1).values if k else flat.max()
        equal = flat == least
        above = flat > least
        kept = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    return [
        part.view(t.shape).to(t.device)
        for part, t in zip(kept.split([t.numel() for t in tensors]), tensors, strict=True)
    ]


def packed_bits(mask: Tensor) -> Tensor:
    """A mask of n entries, of any shape, as ceil(n / 8) bytes, the first entry in the lowest bit."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of this shape that `packed_bits` packed into bytes (ceil(n / 8))."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: math.prod(shape)].bool().view(*shape)


@lru_cache(maxsize=64)
def drawn_cells(n: int, cells: int, seed: int) -> Tensor:
    """The first n of a random permutation of `cells` cells, shape (n), as PEFT draws them."""
    return torch.randperm(cells, generator=torch.Generator().manual_seed(seed))[:n].clone()


class _SparseProduct(Node):
    @staticmethod
    def forward(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, m: int) -> Tensor:
        return x.new_zeros(x.shape[0], m).index_add(1, rows, x.index_select(1, cols) * values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, rows, cols = ctx.saved_tensors
        need_x, need_values = ctx.needs_input_grad[:2]
        g_x = sparse_product(g, values, cols, rows, x.shape[1]) if need_x else None
        g_values = (g.index_select(1, rows) * x.index_select(1, cols)).sum(0) if need_values else None
        return g_x, g_values, None, None, None
