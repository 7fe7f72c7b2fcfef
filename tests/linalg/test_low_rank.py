"""Row lengths of a sum with a factored matrix."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.low_rank import row_squares, row_squares_of_sum, safe_norms


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
