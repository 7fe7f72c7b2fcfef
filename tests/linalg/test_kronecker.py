"""Kronecker products, factor by factor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.kronecker import balanced_factors, rotate_kronecker


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_mode_products_are_the_product_with_the_dense_matrix(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    factors = [torch.randn(c, c, dtype=torch.float64) for c in sizes]
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        dense = torch.kron(dense, factor)
    v = torch.randn(2, 3, math.prod(sizes), dtype=torch.float64)
    torch.testing.assert_close(rotate_kronecker(v, factors), v @ dense)
    torch.testing.assert_close(rotate_kronecker(v, factors, transpose=True), v @ dense.mT)


def test_dtype_of_the_rows_is_kept_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rotate_kronecker(torch.randn(3, 6), [torch.randn(2, 2), torch.randn(3, 3)]).dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (640, (8, 8, 10)),
        (768, (8, 8, 12)),
        (2048, (8, 16, 16)),
        (8, (2, 2, 2)),
        (6, (2, 3)),
        (14, (2, 7)),
        (13, (13,)),
    ],
)
def test_balanced_factors(n: int, expected: tuple[int, ...]) -> None:
    assert balanced_factors(n, 3) == expected


@given(st.integers(2, 500), st.integers(1, 4))
def test_balanced_factors_are_few_ascending_and_multiply_to_the_number(n: int, count: int) -> None:
    factors = balanced_factors(n, count)
    assert math.prod(factors) == n
    assert list(factors) == sorted(factors)
    assert 1 <= len(factors) <= count
    assert min(factors) > 1
