"""Blocks and butterflies applied by reshaping equal their dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg import butterfly
from isotune.linalg.butterfly import drop_blocks, nearest_divisor, rotate_blocks, rotate_butterfly
from isotune.linalg.cayley import above_diagonal, rotation


def drawn_blocks(*shape: int, b: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return rotation(torch.randn(*shape, above_diagonal(b), generator=generator, dtype=torch.float64), b)


def dense_factor(R: Tensor, level: int) -> Tensor:
    """P blockdiag(R) Pᵀ by the paper's words: even halves of a group first, then the odd ones."""
    D, b, _ = R.shape
    d, group = D * b, b * 2**level
    order: list[int] = []
    for start in range(0, d, group):
        halves = torch.arange(start, start + group).view(-1, max(b // 2, 1))
        order += (torch.cat([halves[0::2], halves[1::2]]) if level else halves).flatten().tolist()
    P = torch.eye(d, dtype=R.dtype)[order]
    return P @ torch.block_diag(*R) @ P.mT


@given(st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_blocks_are_a_block_diagonal_product(D: int, b: int, share: bool, seed: int) -> None:
    R = drawn_blocks(1 if share else D, b=b, seed=seed)
    dense = torch.block_diag(*(R.expand(D, b, b)))
    v = torch.randn(2, 3, D * b, dtype=torch.float64)
    torch.testing.assert_close(rotate_blocks(v, R), v @ dense)


@pytest.mark.parametrize("rows", [1, 400])
@pytest.mark.parametrize("wide", [1, 8, 64])
@given(st.integers(1, 4), st.sampled_from([1, 2, 3]), st.sampled_from([2, 4, 6]), st.integers(0, 99))
def test_butterfly_is_the_product_of_its_dense_factors_however_many_are_applied_at_once(
    rows: int, wide: int, m: int, more: int, b: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(butterfly, "_WIDE", wide)
        check_butterfly(rows, m, more, b, seed)


def check_butterfly(rows: int, m: int, more: int, b: int, seed: int) -> None:
    D = more * 2 ** (m - 1)
    R = drawn_blocks(m, D, b=b, seed=seed)
    dense = torch.eye(D * b, dtype=torch.float64)
    for level in range(m):
        dense = dense_factor(R[level], level) @ dense
    v = torch.randn(rows, D * b, dtype=torch.float64)
    torch.testing.assert_close(rotate_butterfly(v, R), v @ dense)
    torch.testing.assert_close(rotate_butterfly(v, R, transpose=True), v @ dense.mT)
    torch.testing.assert_close(rotate_butterfly(rotate_butterfly(v, R), R, transpose=True), v)


def test_butterfly_with_log2_of_the_blocks_and_one_more_factors_is_dense() -> None:
    eye = torch.eye(32, dtype=torch.float64)
    for m, filled in ((1, 4), (2, 8), (3, 16), (4, 32)):
        product = rotate_butterfly(eye, drawn_blocks(m, 8, b=4, seed=0))
        assert (product.abs() > 1e-12).sum() == 32 * filled


def test_products_keep_the_dtype_of_the_rows_also_under_autocast() -> None:
    v, R = torch.randn(3, 8), drawn_blocks(2, 2, b=4, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rotate_butterfly(v, R).dtype == torch.float32
        assert rotate_blocks(v.bfloat16(), R[0]).dtype == torch.bfloat16


def test_dropped_blocks_are_the_identity_and_exactly_that_many() -> None:
    R = drawn_blocks(10, b=3, seed=0)
    for share, count in ((0.0, 0), (0.35, 3), (0.99, 9)):
        kept = drop_blocks(R, share)
        identical = [torch.equal(block, torch.eye(3, dtype=R.dtype)) for block in kept]
        assert sum(identical) == count
        assert all(torch.equal(a, b) for a, b, gone in zip(kept, R, identical, strict=True) if not gone)


def test_nearest_divisor_takes_the_smaller_of_two() -> None:
    assert [nearest_divisor(48, k) for k in (1, 5, 7, 14, 20, 32, 100)] == [1, 4, 6, 12, 16, 24, 48]
