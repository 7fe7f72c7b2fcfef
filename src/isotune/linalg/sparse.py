"""Products with a matrix that has few entries, given as its rows, columns and values; entries at one place add up."""

from __future__ import annotations

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
