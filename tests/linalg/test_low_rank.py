"""Algebra on factored matrices, compared with the dense product."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.low_rank import at_most_full_rank, row_squares, row_squares_of_sum, safe_norms


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_row_lengths_of_a_sum_are_those_of_the_dense_sum(m: int, n: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W, B, A = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, n), (m, r), (r, n)))
    squares = row_squares_of_sum(W, B, A, row_squares(W))
    torch.testing.assert_close(squares, (W + B @ A).square().sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(safe_norms(squares, row_squares(W)), (W + B @ A).norm(dim=1), rtol=1e-6, atol=1e-6)


def test_row_that_cancels_or_is_zero_has_a_small_positive_length() -> None:
    W = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    B, A = torch.tensor([[-1.0], [0.0]]), W[:1].clone()
    norms = safe_norms(row_squares_of_sum(W, B, A, row_squares(W)), row_squares(W))
    assert (norms > 0).all()
    assert norms[0] < 1e-2
    assert norms[1] < 1e-15
    # However rounding falls, also below zero.
    assert safe_norms(torch.tensor([-1e-6]), torch.tensor([25.0])).isfinite().all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_factors_keep_their_product_and_get_no_more_columns_than_the_smaller_side(m: int, n: int, r: int) -> None:
    torch.manual_seed(0)
    B, A = torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)
    left, right = at_most_full_rank(B, A)
    assert left.shape == (m, min(m, n, r))
    torch.testing.assert_close(left @ right, B @ A)
    if r <= min(m, n):
        assert left is B
        assert right is A
