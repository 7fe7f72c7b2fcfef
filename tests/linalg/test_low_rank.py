"""Algebra on factored matrices, compared with the dense product."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.low_rank import at_most_full_rank


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
