"""Sums of shards, and blockwise affine changes, compared with loops over shards and blocks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.shards import block_affine, block_affine_rows, shard_columns, shard_sum


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 15))
def test_shard_sum_adds_every_rth_number_and_is_the_product_with_the_shard_columns(n_in: int, r: int) -> None:
    x = doubles(2, 3, n_in)
    expected = torch.stack([x[..., k::r].sum(-1) for k in range(r)], dim=-1)
    torch.testing.assert_close(shard_sum(x, r), expected)
    A = shard_columns(r, n_in, like=x)
    assert A.shape == (r, n_in)
    torch.testing.assert_close(x @ A.mT, expected)


@st.composite
def drawn_blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    r, down, across = (draw(st.integers(1, 4)) for _ in range(3))
    seed = draw(st.integers(0, 99))
    return doubles(down * r, across * r, seed=seed), doubles(down, r, r, seed=seed + 1)


def by_loops(W: Tensor, B: Tensor) -> Tensor:
    r = B.shape[-1]
    changed = W.clone()
    for p in range(W.shape[0] // r):
        for q in range(W.shape[1] // r):
            block = W[p * r : (p + 1) * r, q * r : (q + 1) * r]
            changed[p * r : (p + 1) * r, q * r : (q + 1) * r] = block @ (torch.eye(r).double() + B[p]) + B[p]
    return changed


@given(drawn_blocks(), st.integers(1, 5))
def test_block_affine_multiplies_and_shifts_every_block_by_the_matrix_of_its_rows(
    blocks: tuple[Tensor, Tensor], n: int
) -> None:
    W, B = blocks
    expected = by_loops(W, B)
    torch.testing.assert_close(block_affine(W, B), expected)
    torch.testing.assert_close(block_affine(W.mT.contiguous().mT, B), expected)
    x = doubles(n, W.shape[1])
    torch.testing.assert_close(block_affine_rows(x, W, B), x @ expected.mT)
